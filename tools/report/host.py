"""The table of benchmarks/README.md of the host's work: launches, its time, and how much is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.report.markdown import table_lines
from tools.report.records import ROOT, Record

# The rows of the record that the page has room for.
SHOWN = (
    "attention, packed",
    "attention, bool mask of padding",
    "attention, learnt bias",
    "residual_layer_norm",
    "feed_forward, relu",
    "linear_cross_entropy, mean",
    "embedding",
    "rotary",
    "encoder layer",
    "encoder layer, padding mask",
    "decoder layer",
    "training step, 6 + 6 layers",
    "decoding step, 6 layers",
)


def summary(record: Record, root: Path = ROOT) -> str:
    """Makes the table of launches and host time of a call: forward with autograd on, and with its backward."""
    environment, found = record.environment, record.data["compilations"]
    path = record.path.relative_to(root) if record.path.is_relative_to(root) else record.path.name
    asked = {kind: sum(map(len, kernels.values())) for kind, kernels in found.items()}
    by_mask = [count for kind, count in asked.items() if kind.startswith("attention")]
    lines = [
        "### The host",
        "",
        f"{record.device}, torch {environment['torch']}, triton {environment['triton']}; `{path}`, "
        f"{environment['date'][:10]}{_load(environment)}. Launches (Triton's, products, torch's others; views and "
        "allocations aside) and waits of the host are counted without a GPU, as one would see them. Times are the "
        "host's alone, through triton's own launcher to a driver that does nothing, as multiples of one `torch.add` on "
        f"the same CPU ({record.data['add_microseconds']:.1f} µs). In brackets the design's budget.",
        "",
        f"{record.data['batches']} ragged batches have {min(by_mask)} to {max(by_mask)} kernels compiled for attention "
        f"and its backward, by kind of mask, and {asked['bundled model, training']} for the bundled model's training.",
        "",
    ]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in record.data["rows"]:
        if row["direction"] != "without grad":
            by_name.setdefault(row["name"], []).append(row)
    table = []
    for name in SHOWN:
        # A step is one piece.
        forward, whole = by_name[name] if len(by_name[name]) == 2 else ({}, *by_name[name])
        table.append([name, _launches(forward), _time(forward), _launches(whole), _time(whole)])
    head = ["", "launches, forward", "time, forward", "launches, with backward", "time, with backward"]
    return "\n".join([*lines, *table_lines(head, table)])


def _load(environment: dict[str, Any]) -> str:
    """Warns where others kept the machine busy: times are longer than they need be then."""
    load, cores = environment["load_average"], environment["cores"]
    return f", beside other work (a load of {load:.0f} on {cores} cores)" if load > cores else ""


def _launches(row: dict[str, Any]) -> str:
    if not row:
        return ""
    count = sum(sum(row[part].values()) for part in ("triton", "products", "others"))
    syncs = sum(row["syncs"].values())
    waits = f", {syncs} wait" + "s" * (syncs > 1) if syncs else ""
    return f"{count:,}{_budget(row['budget']['launches'])}{waits}"


def _time(row: dict[str, Any]) -> str:
    return f"{row['host']:,.0f}{_budget(row['budget']['host'])}" if row else ""


def _budget(most: float | None) -> str:
    return "" if most is None else f" ({most:,.0f})"
