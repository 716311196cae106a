"""Nsight Compute over one call of each of the two cases furthest from their ceiling: what bounds them.

    ncu ... python -m tools.gpu.profile 'benchmarks/bench_norm.py::test_layer_norm[...]'

runs the case that a record names so, eagerly: twice to warm up, then once between cudaProfilerStart and -Stop.

ncu replays each kernel until it has counted everything, the L2 cache flushed before each replay, as the benchmarks'
inputs exceed it; the clocks are left as they are. What it counts exists on sm_90 and sm_100 by these names (those of
the warps' stalls differ from chip to chip, so that they come as ncu's own section); a unit that is busy for 60% of a
kernel's time or more bounds it, as in Nsight Compute's own rules, and where none is, latency does: too few warps, or
warps that wait.

Predicted: a case takes 15 s, ten of them to import, to connect and to build it, the others for some 12 replays each
of up to 20 kernels.
"""

from __future__ import annotations

import csv
import importlib
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from benchmarks import device, record
from benchmarks.measure import step_of
from benchmarks.suite import OURS, Case
from tools.gpu import child
from tools.gpu.run import Run

CASES = 2
# Where NVIDIA's own packages install each version, whatever the machine.
INSTALLED = Path("/opt/nvidia/nsight-compute")
# Kernels of one call: no operation launches as many, and a case that did would take all the time there is.
MOST_LAUNCHES = 64
WARM_UP_CALLS = 2
BUSY = 60.0
STALLS = 3
REASON_LENGTH = 300

Kernel = dict[str, Any]
DURATION, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
OF_PEAK = ".pct_of_peak_sustained_elapsed"
# The metrics that are kept, by our names, all but a duration and bytes in ncu's own units.
METRICS = {
    "SM %": f"sm__throughput.avg{OF_PEAK}",
    "tensor %": f"sm__pipe_tensor_cycles_active.avg{OF_PEAK}",
    "L2 %": f"lts__throughput.avg{OF_PEAK}",
    "L2 hits %": "lts__t_sector_hit_rate.pct",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
}
COUNTED = (DURATION, READ, WRITTEN, READ + OF_PEAK, WRITTEN + OF_PEAK, *METRICS.values())
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
# Nsight Compute 2024 has shortened them.
UNITS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0}
UNITS |= {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
BOUNDS = {"DRAM": "memory", "L2": "memory, in L2", "tensor": "tensor cores", "SM": "instructions"}
# What warps wait for, where ncu's name says little.
WAITS = {
    "long_scoreboard": "data from L2 or device memory",
    "short_scoreboard": "shared memory or special functions",
    "lg_throttle": "the queue of global loads and stores",
    "mio_throttle": "the queue of shared memory",
    "math_pipe_throttle": "a busy arithmetic pipe",
    "gmma": "tensor products under way",
    "barrier": "the other warps of their block",
    "wait": "the instruction before",
    "not_selected": "their turn",
    "no_instruction": "the instruction cache",
    "drain": "their last stores",
}


def profile(run: Run, seconds: float) -> tuple[str, str]:
    """Runs Nsight Compute over the worst cases of this run, one after the other."""
    deadline = time.perf_counter() + seconds
    entries = worst(run.record.get("benchmarks", []))
    if not entries:
        return "missing", "no measured case of ours has a share of its ceiling"
    program = ncu()
    if program is None:
        return "missing", f"no ncu on PATH, in /usr/local/cuda/bin or in {INSTALLED}"
    rows = run.record["profile"] = []
    for place, entry in enumerate(entries):
        command = run.command(f"profile_{place}", "-m", "tools.gpu.profile", entry["fullname"], LC_ALL="C")
        command = command.under(
            program, "--clock-control", "none", "--profile-from-start", "off", "--launch-count", str(MOST_LAUNCHES),
            "--csv", "--page", "raw", "--print-units", "base",
            "--section", "WarpStateStats", "--metrics", ",".join(COUNTED),
        )  # fmt: skip
        end = child.run_one(command, (deadline - time.perf_counter()) / (len(entries) - place))
        rows.append(_row(entry, command.text(), end))
    worst_state = max((row["state"] for row in rows), key=("done", "out of time", "failed").index)
    return worst_state, "; ".join(f"{row['suite']}: {said(row)}" for row in rows)


def worst(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns our entries with the lowest share of their ceiling, of different operations, by the time of a call alone.

    Where launches outlast the kernels only a graph's replay says how fast these are.
    """
    ours = [
        entry
        for entry in entries
        if (info := entry["extra_info"]).get("peer") == OURS
        and "share" in info
        and "failed" not in info
        and (info["mode"] == "graph" or not info["launch_bound"])
    ]
    chosen: dict[str, dict[str, Any]] = {}
    for entry in sorted(ours, key=lambda entry: entry["extra_info"]["share"]):
        chosen.setdefault(entry["extra_info"]["suite"], entry)
    return list(chosen.values())[:CASES]


def ncu() -> str | None:
    """Returns the path of Nsight Compute's program: with the CUDA toolkit, or by itself, its newest version."""
    versions = {
        tuple(map(int, re.findall(r"\d+", path.parent.name))): str(path) for path in sorted(INSTALLED.glob("*/ncu"))
    }
    return record.cuda_tool("ncu") or (versions[max(versions)] if versions else None)


def _row(entry: dict[str, Any], text: str, end: child.End) -> dict[str, Any]:
    info = entry["extra_info"]
    row = {name: info[name] for name in ("suite", "size", "direction", "peer", "share")}
    row |= {"case": entry["fullname"], "state": end.state, "reason": end.reason, "kernels": []}
    try:
        row["kernels"] = kernels(text)
    except ValueError as error:
        return row | {"state": "failed", "reason": str(error)}
    errors = [line.removeprefix("==ERROR==").strip() for line in text.splitlines() if line.startswith("==ERROR==")]
    if errors:
        return row | {"state": "failed", "reason": shorten("; ".join(dict.fromkeys(errors)), REASON_LENGTH)}
    if not row["kernels"]:
        return row | {"state": end.state.replace("done", "failed"), "reason": end.reason or "ncu saw no kernel"}
    largest = row["kernels"][0]
    total = sum(kernel["seconds"] for kernel in row["kernels"])
    return row | {"kernel_seconds": total, "kernel": brief(largest["name"]), "bound": bound(largest)}


def kernels(text: str) -> list[Kernel]:
    """Reads ncu's raw page in CSV, an entry a kernel, the one that took longest first; other lines do not count.

    Where one was launched more than once, `seconds` are their sum and the rest is of the longest launch.

    Raises:
        ValueError: a duration or bytes are in a unit that is unknown here.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    heads = [place for place, line in enumerate(lines) if line.startswith('"ID",')]
    if not heads:
        return []
    head, units, *rows = csv.reader(lines[heads[0] :])
    launches = [_launch(head, units, row) for row in rows if len(row) == len(head)]
    found: dict[str, Kernel] = {}
    for launch in sorted(launches, key=lambda launch: -launch["seconds"]):
        kernel = found.setdefault(launch["name"], launch | {"seconds": 0.0, "launches": 0})
        kernel["seconds"] += launch["seconds"]
        kernel["launches"] += 1
    return sorted(found.values(), key=lambda kernel: -kernel["seconds"])


def _launch(head: Sequence[str], units: Sequence[str], row: Sequence[str]) -> Kernel:
    values = {name: value for name, cell in zip(head, row, strict=True) if (value := _number(cell)) is not None}
    unit = dict(zip(head, units, strict=True))

    def in_base(name: str) -> float | None:
        if name in values and unit[name] not in UNITS:
            raise ValueError(f"ncu: {name}: expected one of {', '.join(UNITS)}, got {unit[name]!r}")
        return values[name] * UNITS[unit[name]] if name in values else None

    def total(first: float | None, second: float | None) -> float | None:
        return None if first is None or second is None else first + second

    seconds, moved = in_base(DURATION), total(in_base(READ), in_base(WRITTEN))
    if not seconds:
        raise ValueError(f"ncu: expected a duration of {row[head.index('Kernel Name')]}, got none")
    waits = {match[1]: values[name] for name in values if (match := STALL.fullmatch(name))}
    # Issuing an instruction is no wait; together they are all that a warp does.
    cycles, issued = sum(waits.values()), waits.pop("selected", 0.0)
    longest = sorted(waits, key=lambda name: -waits[name])[:STALLS] if cycles > issued else []
    return {
        "name": row[head.index("Kernel Name")],
        "seconds": seconds,
        "GB/s": None if moved is None else moved / seconds / 1e9,
        "DRAM %": total(values.get(READ + OF_PEAK), values.get(WRITTEN + OF_PEAK)),
        **{name: values.get(metric) for name, metric in METRICS.items()},
        "stalls": {name: waits[name] / cycles for name in longest},
    }


def _number(cell: str) -> float | None:
    """Returns the number in "1,234.5" and the like; None for words, "n/a" among them."""
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def bound(kernel: Kernel) -> str:
    """Says what keeps a kernel from being faster."""
    busy = {name: kernel[f"{name} %"] or 0.0 for name in ("DRAM", "L2", "tensor", "SM")}
    shares = ", ".join(f"{name} {share:.0f}%" for name, share in busy.items())
    # The SM's own number includes the tensor cores and all else in it: it counts only where nothing else does.
    top = max(("DRAM", "L2", "tensor"), key=lambda name: busy[name])
    if busy[top] >= BUSY or busy["SM"] >= BUSY:
        unit = top if busy[top] >= BUSY else "SM"
        return f"{BOUNDS[unit]} ({shares} of peak)"
    words = []
    if kernel["waves"] is not None and kernel["waves"] < 1:
        words.append(f"its blocks fill {kernel['waves']:.0%} of the GPU once")
    for stall, share in list(kernel["stalls"].items())[:1]:
        words.append(f"warps wait {share:.0%} of their time for {WAITS.get(stall, stall)}")
    return "; ".join([f"latency ({shares} of peak)", *words])


def said(row: dict[str, Any]) -> str:
    """Says what came of a case, in a line."""
    return f"{row['kernel']}: {row['bound']}" if "bound" in row else row["reason"]


def brief(name: str) -> str:
    """Shortens a kernel's name; C++'s without its arguments and those of its template."""
    plain = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::", "", name)
    return re.split(r"[<(]", plain)[0]


def find(name: str) -> Case:
    """Returns the case that a record calls so.

    Raises:
        ValueError: there is none of that name.
    """
    path, _, test = name.partition("::")
    function, _, wanted = test.removesuffix("]").partition("[")
    (parametrized,) = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function).pytestmark
    _, cases = parametrized.args
    for case in cases:
        if str(case) == wanted:
            return case
    raise ValueError(f"{path}: expected one of its cases, got {wanted!r}")


def main() -> None:
    case = find(sys.argv[1])
    torch.manual_seed(1)
    with device.kernels_as_on_a_gpu(), case.peer.context():
        step = step_of(case.peer.function, case.inputs(), case.direction)
        for _ in range(WARM_UP_CALLS):
            step()
        device.synchronize()
        with torch.cuda.profiler.profile() if device.CUDA else nullcontext():
            step()
            device.synchronize()


if __name__ == "__main__":
    main()
