"""The proof on the GPU: the kernels compile for it, the tests pass, and compute-sanitizer has nothing to say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import record
from tools.gpu import child
from tools.gpu.run import Run, cores, ended, subject

# Exit statuses of pytest that are no failure of the run: tests that failed are counted.
TESTS_FAILED, NOTHING_COLLECTED = 1, 5
# What compute-sanitizer says last, tool by tool.
SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) errors?"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: .*\((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)"),
}
SANITIZER_LINES = 60
# The chip that a rehearsal compiles for.
REHEARSED_CAPABILITY = 90


def kernels(run: Run, seconds: float) -> tuple[str, str]:
    """Compiles every kernel for this GPU ahead of time."""
    capability = REHEARSED_CAPABILITY
    if not run.options.rehearse:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    words = ["-m", "tools.gpu.kernels", "--capability", str(capability), "--workers", str(cores())]
    if not run.options.everything:
        words += ["--only", *run.options.suites]
    command = run.command("kernels", *words)
    end = child.run_one(command, seconds)
    lines = child.read(command.journal)
    for line in lines:
        if "missing" in line:
            return "missing", line["missing"]
    rows = run.record["kernels"] = [line["kernel"] for line in lines if "kernel" in line]
    faults = [fault for line in lines for fault in line.get("verdict", ())]
    return ended(end, f"{len(rows)} compiled" + (f", must not ship: {', '.join(faults)}" if faults else ""))


def tests(run: Run, seconds: float) -> tuple[str, str]:
    """Runs every test of a kernel on the GPU."""
    root = child.ROOT
    files = [path for path in sorted((root / "tests").rglob("test_*.py")) if run.options.covers(subject(path))]
    if not files:
        return "missing", "no test of that name"
    names = [str(path.relative_to(root)) for path in files]
    command = run.pytest("tests", *names, "-m", "gpu", "-n", str(run.workers()), "-q")
    end = child.run_one(command, seconds)
    results = run.record["tests"] = summary(child.read(command.journal)) | {"seconds": end.seconds}
    counts = ", ".join(f"{results[name]} {name}" for name in ("passed", "failed", "skipped", "not_run"))
    if end.status == NOTHING_COLLECTED:
        return "missing", "none of these tests needs a GPU"
    return ("done", counts) if end.status == TESTS_FAILED else ended(end, counts)


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts the tests that passed, failed and were skipped, with what the failed ones said."""
    outcomes: dict[str, dict[str, Any]] = {}
    for line in lines:
        # A test whose teardown fails has passed before: the failure counts.
        name = line.get("finished")
        if name is not None and (name not in outcomes or outcomes[name]["outcome"] != "failed"):
            outcomes[name] = line
    counts = Counter(line["outcome"] for line in outcomes.values())
    # Where a process went on after another, the first one's list is the whole.
    collected = max((sum(line["collected"].values()) for line in lines if "collected" in line), default=0)
    failed = [line for line in outcomes.values() if line["outcome"] == "failed"]
    return {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "not_run": max(0, collected - counts.total()),
        "failures": [
            {"test": line["finished"], "message": line["message"], "detail": line.get("detail", "")} for line in failed
        ],
    }


def sanitizer(run: Run, seconds: float) -> tuple[str, str]:
    """Runs compute-sanitizer over a small pass of every kernel, its two tools side by side."""
    program = record.cuda_tool("compute-sanitizer")
    if program is None:
        reason = "no compute-sanitizer on PATH or in /usr/local/cuda/bin"
        run.record["sanitizer"] = {name: {"state": "missing", "reason": reason} for name in SUMMARIES}
        return "missing", reason
    words = ["-m", "tools.sanitize.every_kernel", *(() if run.options.everything else run.options.suites)]
    commands = {}
    for name in SUMMARIES:
        # Each tensor is an allocation of its own, so that an access behind its end is seen.
        command = run.command(name, *words, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        commands[name] = command.under(program, "--tool", name, "--print-limit", "20")
    ends = child.run(commands, seconds)
    results = run.record["sanitizer"] = {name: _verdict(name, commands[name], ends[name]) for name in SUMMARIES}
    worst = max((result["state"] for result in results.values()), key=("done", "out of time", "failed").index)
    return worst, ", ".join(f"{name}: {result['reason']}" for name, result in results.items())


def _verdict(tool: str, command: child.Command, end: child.End) -> dict[str, Any]:
    text = command.text()
    found = SUMMARIES[tool].search(text)
    counts = {kind: int(number) for kind, number in found.groupdict().items()} if found else {}
    state = end.state if found else end.state.replace("done", "failed")
    reason = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    lines = child.read(command.journal)
    missing = [line["missing"] for line in lines if "missing" in line]
    return {
        "state": "failed" if counts.get("errors") else state,
        "reason": "; ".join(filter(None, (end.reason, reason or "without a summary", *missing))),
        "seconds": end.seconds,
        **counts,
        "passes": [line["passed"] for line in lines if "passed" in line],
        "missing": missing,
        "report": [line for line in text.splitlines() if line.startswith("=========")][:SANITIZER_LINES],
    }
