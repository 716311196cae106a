"""The tables of benchmarks/README.md, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tools.report import host
from tools.report.charts import label
from tools.report.markdown import table_lines
from tools.report.records import ROOT, Record, Row, newest
from tools.report.sources import subject_of, subjects

NAMES = {
    "tfm": "tfm, fp32",
    "tfm-bf16": "tfm, autocast bf16",
    "eager": "torch eager, fp32",
    "eager-bf16": "torch eager, autocast bf16",
    "compile": "torch.compile, fp32",
    "compile-bf16": "torch.compile, autocast bf16",
}
CORPORA = {
    "bundled": "the bundled corpus",
    "multi30k": "Multi30k",
    "synthetic": "random tokens in sentences of Multi30k's lengths",
}
STALE = "stale"
BOUNDS = {"copy": "memory", "cache": "cache", "matmul": "matmul"}


def markdown(records: Sequence[Record], root: Path = ROOT) -> str:
    """Returns every measurement: the training records, the newest record of each device, and what is missing."""
    of_training = [record for record in records if record.data.get("benchmark") == "training"]
    # Among several that measured the same, the newest tells the speed; older ones only what was learnt.
    fastest = {_task(record): record for record in of_training if record.data.get("throughput")}
    parts = [training(record, fastest.get(_task(record), record) is record) for record in reversed(of_training)]
    parts += [learning(record) for record in reversed(records) if record.data.get("benchmark") == "learning"]
    parts += [host.summary(record, root) for record in records if record.data.get("benchmark") == "host"]
    parts += [device(record, root) for record in newest(records)]
    parts.append(missing(records, root))
    return "\n\n".join(parts)


def device(record: Record, root: Path = ROOT) -> str:
    """Returns the newest record of a device: its ceilings, its tests, a table for each operation."""
    lines = [f"### {record.device}", "", f"{provenance(record, root)}."]
    if ceilings := record.data.get("ceilings"):
        lines.append(f"Measured in the same run: {', '.join(_ceilings(ceilings)) or 'no ceilings'}.")
    if any(_is_cached(row) for row in record.rows):
        lines.append("What is faster than memory moved data that caches hold: memory is no bound of it.")
    if tests := record.data.get("tests"):
        lines.append(
            f"Tests there: {tests['passed']:,} passed, {tests['failed']:,} failed, {tests['skipped']:,} skipped."
        )
    for chart in charts_of(record):
        lines += ["", f"![{chart.stem.replace('_', ' ')}]({_linked(chart, root)})"]
    for suite in record.suites:
        stale = record.changed_sources(suite, root)
        mark = f" ({STALE}: {', '.join(stale)} changed since)" if stale else ""
        lines += ["", f"**{suite}**{mark}", "", *_suite(record, suite, stale=bool(stale))]
    for preset, throughput in record.data.get("training", {}).items():
        lines += ["", f"**Training step, preset {preset}**", "", *_throughput(throughput["throughput"], "eager-bf16")]
    if taught := record.data.get("quality"):
        preset, corpus = taught["arguments"]["preset"], CORPORA[taught["corpus"]]
        lines += ["", f"**Translation, preset {preset} trained on {corpus}**", "", *_learnt(taught)]
    if profiled := record.data.get("profile"):
        lines += ["", "**What bounds the slowest kernels** (Nsight Compute, one call)", "", *_profile(profiled)]
    return "\n".join(lines)


def provenance(record: Record, root: Path) -> str:
    """Returns on what a record of a device was made: its versions, its threads where it is a CPU, its file, its day."""
    environment = record.environment
    names = ("torch", "triton", "driver")
    versions = ", ".join(f"{name} {environment[name]}" for name in names if environment.get(name))
    if environment["gpu"] is None:
        versions += f", {environment['threads']} thread" + "s" * (environment["threads"] > 1)
    return f"{versions}; `{shown(record.path, root)}`, {environment['date'][:10]}"


def _suite(record: Record, suite: str, stale: bool) -> list[str]:
    rows = [row for row in record.rows if row.suite == suite]
    peers = list(dict.fromkeys(row.peer for row in rows if not row.is_ours))
    table = []
    for ours in (row for row in rows if row.is_ours):
        speed = {row.peer: _ratio(ours, row) for row in rows if row.case == ours.case}
        time = f"failed: {ours.failed}" if ours.failed else _time(ours.seconds)
        ratios = (speed.get(peer, "") for peer in peers)
        table.append([label(ours), time + f" ({STALE})" * stale, _rate(ours), _share(ours), *ratios])
    return table_lines(["case", "time", "rate", "of what bounds it", *(f"{peer} / ours" for peer in peers)], table)


def _ceilings(measured: dict[str, Any]) -> list[str]:
    """Returns each ceiling with its name, its rate, and by what it was measured."""
    found = []
    if copy := measured.get("copy", {}).get("GB/s"):
        found.append(f"memory {copy:,.0f} GB/s (a copy that no cache holds)")
    for level in measured.get("caches", []):
        size = level["bytes"] >> 10
        shown = f"{size >> 10} MiB" if size >= 1 << 10 else f"{size} KiB"
        found.append(f"caches {level['GB/s']:,.0f} GB/s (a copy that moves {shown})")
    if rate := measured.get("matmul", {}).get("TFLOP/s"):
        kind = {"float32": "fp32"}.get(measured["matmul"].get("dtype"), "bf16")
        found.append(f"{kind} matmul {_flops(rate)}")
    return found


def _share(row: Row) -> str:
    if row.share is None:
        return ""
    if _is_cached(row):
        return f"in cache, {row.share:.2f} × memory"
    return f"{row.share:.0%} of {BOUNDS[row.ceiling]}"


def _is_cached(row: Row) -> bool:
    """Tells whether it is faster than memory, in records that know no ceiling of the caches."""
    return row.is_ours and row.ceiling == "copy" and (row.share or 0.0) > 1


def _ratio(ours: Row, peer: Row) -> str:
    if peer.failed:
        return "failed"
    ratio = peer.times(ours)
    return "" if ratio is None else f"{ratio:.2f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e6:,.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def _rate(row: Row) -> str:
    extra = row.entry["extra_info"]
    if "TFLOP/s" in extra:
        return _flops(extra["TFLOP/s"])
    return f"{extra['GB/s']:,.0f} GB/s" if "GB/s" in extra else ""


def _flops(rate: float) -> str:
    return f"{rate:,.0f} TFLOP/s" if rate >= 10 else f"{1e3 * rate:,.0f} GFLOP/s"


def training(record: Record, with_speed: bool = True, with_learnt: bool = True) -> str:
    """Returns what a record of the training benchmark says: tokens a second, then what the same minutes taught."""
    environment, arguments = record.environment, record.data["arguments"]
    corpus, preset, _ = _task(record)
    lines = [
        f"Training preset `{preset}` on {CORPORA[corpus]}, batches of {arguments['batch_tokens']:,} tokens, on "
        f"{record.device}, {environment['threads']} threads, torch {environment['torch']} (`{record.path.name}`, "
        f"{environment['date'][:10]}, commit {str(environment['commit'])[:7]})."
    ]
    if with_speed:
        lines[0] += (
            f" Real tokens a second, source and target, {arguments['repeats']} repeats of "
            f"{arguments['throughput_seconds']:.0f} seconds in turn:"
        )
        lines += ["", *_throughput(record.data.get("throughput", {}), "eager")]
    if with_learnt and record.data.get("quality"):
        lines += ["", *_learnt(record.data)]
    return "\n".join(lines)


def learning(record: Record) -> str:
    """Returns a record of the learning benchmark: losses of both sides at equal updates, and whether they differ."""
    arguments, points, found = record.data["arguments"], record.data["points"], record.data["summary"]
    lines = [
        f"At equal updates: preset `{arguments['preset']}` on {CORPORA[record.data['corpus']]} with dropout "
        f"{arguments['dropout']}, batches of {arguments['batch_tokens']:,} tokens, {len(found['seeds'])} seeds of each "
        f"from the same weights on the same batches (`{record.path.name}`, {record.environment['date'][:10]}). Mean "
        "and standard deviation of the validation loss over the seeds, the mean of the paired differences with its "
        "standard error, and how many sign patterns of them lie as far from 0:",
        "",
    ]
    losses = found["validation_loss"]
    rows = []
    for place, update in enumerate(points):
        if update % 100 == 0:
            ours, theirs, apart = (losses[name][place] for name in ("tfm", "eager", "difference"))
            moments = [f"{side['mean']:.3f} ± {side['deviation']:.3f}" for side in (ours, theirs)]
            difference = f"{apart['mean']:+.3f} ± {apart['standard_error']:.3f}"
            rows.append([f"{update:,}", *moments, difference, f"{apart['p']:.0%}"])
    return "\n".join(lines + table_lines(["updates", NAMES["tfm"], NAMES["eager"], "difference", "as far"], rows))


def _task(record: Record) -> tuple[str, str, str]:
    """Returns the corpus, the preset and the device of a training."""
    corpus = record.data["corpus"]
    preset = record.data["arguments"]["preset"] or ("demo" if corpus == "bundled" else "tiny")
    return corpus, preset, record.device


def _throughput(results: dict[str, Any], baseline: str) -> list[str]:
    rows = []
    for name, result in results.items():
        label = NAMES.get(name, name)
        if "failed" in result:
            rows.append([label, f"failed: {result['failed']}", "", ""])
            continue
        speeds = [repeat["tokens_per_second"] for repeat in result["repeats"]]
        bases = [repeat["tokens_per_second"] for repeat in results.get(baseline, {}).get("repeats", [])]
        ratios = [speed / base for speed, base in zip(speeds, bases, strict=False)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
        rows.append([label, f"{median(speeds):,.0f}", f"{min(speeds):,.0f}-{max(speeds):,.0f}", spread])
    return table_lines(["", "tokens/s, median", "range", f"ratio to {NAMES[baseline]}, same round"], rows)


def _learnt(data: dict[str, Any]) -> list[str]:
    """Returns what a record of the training benchmark says of translations, and how long the models had learnt."""
    arguments = data["arguments"]
    # Older records know no limit but minutes. Beside it these say little: a row says how many updates fitted in them.
    updates = arguments.get("updates")
    limit = f"Within {updates:,} updates" if updates else f"In {arguments['minutes']:.0f} minutes"
    title = f"{limit} each, greedy BLEU by sacrebleu on tokenized lower-cased text:"
    return [title, "", *_quality(data["quality"], arguments["test_set"], updates)]


def _quality(results: list[dict[str, Any]], test_set: str, wanted: int | None) -> list[str]:
    rows = []
    for result in results:
        label = f"{NAMES.get(result['contender'], result['contender'])}, seed {result['seed']}"
        if "failed" in result:
            rows.append([label, f"failed: {result['failed']}", "", "", "", "", ""])
            continue
        updates = f"{result['updates']:,}" + (f" of {wanted:,}" if wanted and result["updates"] < wanted else "")
        numbers = f"{result['tokens_per_second']:,.0f}", updates, f"{result['epochs']:.1f}"
        validation, test = result["validation"], result["test"]
        rows.append([label, *numbers, f"{validation['loss']:.3f}", f"{validation['bleu']:.1f}", f"{test['bleu']:.1f}"])
    head = ["", "tokens/s", "updates", "epochs", "validation loss", "BLEU, validation", f"BLEU, {test_set}"]
    return table_lines(head, rows)


def _profile(rows: Sequence[dict[str, Any]]) -> list[str]:
    table = []
    for row in rows:
        case = f"{row['suite']} {row['size']}, {row['direction']}, {row['peer']}"
        found = [f"`{row['kernel']}`", row["bound"]] if "bound" in row else ["", f"{row['state']}: {row['reason']}"]
        table.append([case, f"{row['share']:.0%}", *found])
    return table_lines(["case", "of ceiling", "longest kernel", "what bounds it"], table)


def missing(records: Sequence[Record], root: Path = ROOT) -> str:
    """Names, in one paragraph, the subjects with kernels that no record of a GPU covers."""
    gpus = [record for record in newest(records) if record.environment["gpu"]]
    covered = {subject_of(suite, root) for record in gpus for suite in record.suites}
    bare = [name for name in subjects(root) if name not in covered]
    if not gpus:
        return "No record of a GPU yet: nothing is claimed for one."
    return f"No record of a GPU covers: {', '.join(f'`{name}`' for name in bare)}." if bare else ""


def charts_of(record: Record) -> list[Path]:
    """Returns the paths of a record's pictures, those that have been drawn."""
    paths = (record.path.with_name(f"{record.path.stem}_{kind}.png") for kind in ("roofline", "speed_up"))
    return [path for path in paths if path.exists()]


def shown(path: Path, root: Path) -> str:
    """Returns a path as people name it: from the root, where it lies there."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _linked(path: Path, root: Path) -> str:
    """Returns a path as benchmarks/README.md links to it."""
    return shown(path, root / "benchmarks")
