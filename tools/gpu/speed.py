"""The timings on the GPU: the two ceilings, every benchmark of an operation, training steps of the presets."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.summary import add_speed_ups
from tools.gpu import child
from tools.gpu.proof import NOTHING_COLLECTED, TESTS_FAILED, summary
from tools.gpu.pytest_journal import failed_entry
from tools.gpu.run import Options, Run, ended, subject

# Importing hypothesis takes a second, and no benchmark needs it.
PYTEST = ("-o", "python_files=bench_*.py", "-q", "-p", "no:hypothesispytest")
# Inductor compiles without its pool: one for each of many processes is too much, and none may run beside a timed one.
ALONE = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
# The bundled model stands beside them in the same dtype.
TRAINING_PEERS = ("eager-bf16", "compile-bf16")
TRAINING_REPEATS = 3
# The name in cases whose peer has Inductor time its matmuls; and the share of the warm-up for the others.
TUNED, PARALLEL_SHARE = "max-autotune", 0.7
# The share of a preset's time, the rest being for building and warm-up, and the most seconds that say anything more.
TRAINING_TIMED, MOST_SECONDS = 0.5, 5.0
REHEARSED_SECONDS = 0.1


def presets(options: Options) -> tuple[str, ...]:
    """Returns the presets that are trained: the bundled model's sizes, one of them where time is short."""
    return ("tiny",) if options.rehearse else ("base",) if options.quick else ("tiny", "base", "big")


def ceilings(run: Run, seconds: float) -> tuple[str, str]:
    """Measures the rates that shares are shares of."""
    command = run.command("copy_and_matmul", "-m", "tools.gpu.ceilings")
    end = child.run_one(command, seconds)
    measured = {name: value for line in child.read(command.journal) for name, value in line.items()}
    run.record.setdefault("environment", {})["clocks_under_load"] = measured.pop("clocks_under_load", None)
    run.record["ceilings"] = measured
    units = {"copy": "GB/s", "matmul": "TFLOP/s"}
    rates = {name: measured[name][unit] for name, unit in units.items() if name in measured}
    if rates.keys() == units.keys():
        run.ceilings.write_text(json.dumps(rates))
    return ended(end, ", ".join(f"{name} {rate:,.0f} {units[name]}" for name, rate in rates.items()))


def warm_up(run: Run, seconds: float) -> tuple[str, str]:
    """Runs every benchmark once, untimed: what Triton and Inductor compile is on the disk afterwards.

    In parallel, but for the peers that choose their matmuls by timing them: those have the GPU to themselves.
    """
    deadline = time.perf_counter() + seconds
    files = [_file(name) for name in run.options.suites if name != "training"]
    words = *files, *PYTEST, "--benchmark-disable"
    commands = {}
    if files:
        parallel = "-k", f"not {TUNED}", "-n", str(run.workers())
        commands["suites"] = run.pytest("warm_up", *words, *parallel, **ALONE)
    if "training" in run.options.suites:
        for preset in presets(run.options):
            commands[preset] = _training(run, preset, f"warm_up_{preset}", REHEARSED_SECONDS, repeats=1)
    ends = child.run(commands, seconds * PARALLEL_SHARE)
    forget_tuning(run.inductor)
    if files:
        commands["tuned"] = run.pytest("warm_up_tuned", *words, "-k", TUNED)
        ends["tuned"] = child.run_one(commands["tuned"], deadline - time.perf_counter())
    lines = [line for name in ("suites", "tuned") if name in commands for line in child.read(commands[name].journal)]
    cases: Counter[str] = sum((Counter(line["collected"]) for line in lines if "collected" in line), Counter())
    run.cases |= {subject(Path(file)): count for file, count in cases.items()}
    counts = summary(lines)
    # Cases that failed are counted, and not every run has some that are tuned.
    usual = {("suites", TESTS_FAILED), ("tuned", TESTS_FAILED), ("tuned", NOTHING_COLLECTED)}
    trouble = [f"{name}: {end.reason}" for name, end in ends.items() if end.reason and (name, end.status) not in usual]
    state = "out of time" if any(end.status is None for end in ends.values()) else "failed" if trouble else "done"
    found = f"{counts['passed']} cases ran, {counts['failed']} failed" if files else ""
    return state, "; ".join(filter(None, (found, *trouble)))


def forget_tuning(cache: Path) -> None:
    """Deletes Inductor's choices of block sizes, timed while others used the GPU: each is made again alone."""
    for choice in cache.rglob("*.best_config"):
        choice.unlink()


def suite(run: Run, seconds: float, name: str) -> tuple[str, str]:
    """Runs one file of benchmarks. Where its process dies, another goes on after the case that it died of."""
    deadline = time.perf_counter() + seconds
    command = run.pytest(f"bench_{name}", _file(name), *PYTEST, "--benchmark-enable", **ALONE)
    lines: list[Any] = []
    while True:
        end = child.run_one(command, deadline - time.perf_counter())
        begun, lines = len(lines), child.read(command.journal)
        if not end.died or len(lines) == begun:
            break
        close(command.journal, lines, f"its process {end.reason}")
    if end.status is None:
        close(command.journal, lines, "out of time")
    # The last entry of a case counts: a GPU may turn out to be lost after it was timed.
    lines = child.read(command.journal)
    entries = {line["entry"]["fullname"]: line["entry"] for line in lines if "entry" in line}
    for entry in entries.values():
        entry["extra_info"].setdefault("suite", name)
    add_speed_ups([entry for entry in entries.values() if "mode" in entry["extra_info"]])
    run.record.setdefault("benchmarks", []).extend(entries.values())
    failed = sum("failed" in entry["extra_info"] for entry in entries.values())
    counts = f"{len(entries) - failed} cases measured, {failed} failed, {summary(lines)['not_run']} not run"
    return ("done", counts) if end.status == TESTS_FAILED and entries else ended(end, counts)


def close(journal: Path, lines: Sequence[dict[str, Any]], reason: str) -> None:
    """Records as failed the case that its process was in when it ended."""
    finished = {line["finished"] for line in lines if "finished" in line}
    known = {line["case"]: line["info"] for line in lines if "case" in line}
    for case in [line["started"] for line in lines if "started" in line and line["started"] not in finished]:
        child.append(journal, {"finished": case, "outcome": "failed", "seconds": 0.0, "message": reason})
        child.append(journal, {"entry": failed_entry(case, reason, known.get(case, {}))})


def training(run: Run, seconds: float, preset: str) -> tuple[str, str]:
    """Measures tokens a second of a preset's training step, against torch.nn.Transformer, all in autocast bf16."""
    timed = min(MOST_SECONDS, seconds * TRAINING_TIMED / TRAINING_REPEATS / (1 + len(TRAINING_PEERS)))
    if run.options.rehearse:
        timed = REHEARSED_SECONDS
    command = _training(run, preset, f"training_{preset}", timed, TRAINING_REPEATS)
    end = child.run_one(command, seconds)
    result = command.journal.with_suffix(".json")
    if not result.exists():
        return ended(end, "no result")
    measured = json.loads(result.read_text())
    run.record.setdefault("training", {})[preset] = measured
    rates = {name: _median(contender) for name, contender in measured.get("throughput", {}).items()}
    return ended(end, ", ".join(f"{name} {rate}" for name, rate in rates.items()))


def _training(run: Run, preset: str, name: str, seconds: float, repeats: int) -> child.Command:
    words = ["--preset", preset, "--peers", ",".join(TRAINING_PEERS), "--minutes", "0"]
    words += ["--throughput-seconds", f"{seconds:.2f}", "--repeats", str(repeats)]
    words += ["--out", str(run.folder / f"{name}.json")]
    if run.options.data is not None:
        words += ["--data", str(run.options.data)]
    return run.command(name, "-m", "benchmarks.bench_training", *words)


def _median(contender: dict[str, Any]) -> str:
    if "failed" in contender:
        return f"failed: {contender['failed']}"
    return f"{contender['median']:,.0f} tokens/s" if "median" in contender else "unfinished"


def _file(suite: str) -> str:
    return f"benchmarks/bench_{suite}.py"
