"""`python -m tools.gpu` without a GPU: from a bare copy of the checkout, with parts that fail, die or are late."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from measured import a_run

from tfm.native import toolchain
from tools.gpu import __main__ as command
from tools.gpu import child, speed

ROOT = Path(command.ROOT)
HAS_COMPILER = not toolchain.missing()
# One kernel in the place of all, so that nothing is compiled for minutes.
SUBJECTS = """
from itertools import islice


def subjects():
    from tools.subjects import norm

    return [norm]


def compiled(every):
    return islice(subjects()[0].compiled(every), 1)


ALL = (compiled,)
"""
TESTS = """
import pytest


def test_passes(kernel_device):
    assert kernel_device.type == "cpu"


def test_fails(kernel_device):
    raise ValueError("not the same numbers")


@pytest.mark.gpu
def test_is_skipped():
    raise AssertionError


def test_of_no_kernel():
    raise AssertionError
"""
BROKEN = "raise ImportError('a peer that moved')"
TROUBLED = """
import os
import signal
import time
from dataclasses import dataclass

import pytest

ACTIONS = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "fails": lambda: 1 // 0,
    "goes on": int,
    "late": lambda: time.sleep(600),
    "behind": int,
}


@dataclass
class Case:
    peer: str

    def info(self):
        return {"suite": "troubled", "direction": "forward", "size": "1", "mode": "eager", "peer": self.peer}


@pytest.mark.parametrize("case", map(Case, ACTIONS), ids=lambda case: case.peer)
def test_troubled(benchmark, case):
    benchmark.extra_info |= case.info()
    benchmark.pedantic(ACTIONS[case.peer], rounds=3)
"""
SANITIZER = """#!/bin/sh
shift 4
"$@" && echo "========= ERROR SUMMARY: 0 errors"
"""
# Past its own options it runs the program, and then says what ncu would.
NCU = """#!/bin/sh
until [ -x "$1" ]; do shift; done
"$@" && cat "$(dirname "$0")/../tests/ncu_output.txt"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The folders of the checkout alone: no git, no virtual environment; some of its files replaced by smaller ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("tfm", "kernels", "csrc", "benchmarks", "tools", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results", "test_*"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "tools" / "subjects" / "__init__.py").write_text(SUBJECTS)
    (copy / "tests" / "norm" / "test_norm.py").write_text(TESTS)
    for name, text in {"broken": BROKEN, "troubled": TROUBLED}.items():
        (copy / "benchmarks" / f"bench_{name}.py").write_text(text)
    with (copy / "kernels" / "norm.py").open("a") as file:
        file.write("# this copy\n")
    return copy


@pytest.fixture(scope="module")
def rehearsed(checkout) -> tuple[dict, subprocess.CompletedProcess[str]]:
    """The record of a rehearsal in the copy, and what it printed; the sanitizer is a script that runs the pass."""
    tools = checkout / "bin"
    tools.mkdir()
    for name, script in {"compute-sanitizer": SANITIZER, "ncu": NCU}.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "TRITON_CACHE_DIR": str(checkout / "cache")}
    environment |= {"COMMIT": "1234abcd", "OUT": str(checkout / "out" / "record.json")}
    words = [sys.executable, "-m", "tools.gpu", "--rehearse", "--quick", "--minutes", "60"]
    words += ["--only", "norm,broken,training"]
    # On one core: every process at a time that a larger machine has takes seconds to start.
    core = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        words, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )  # fmt: skip
    return json.loads(Path(environment["OUT"]).read_text()), done


def test_every_part_has_its_section(rehearsed, checkout):
    record, done = rehearsed
    assert [row["name"] for row in record["parts"]] == [
        "environment", "native", "kernels", "ceilings", "tests", "sanitizer", "warm-up", "norm", "broken",
        "profile", "training tiny", "quality",
    ]  # fmt: skip
    assert record["format"] == 1
    assert record["rehearsal"]
    assert record["environment"]["commit"] == "1234abcd"
    kernel = (checkout / "kernels" / "norm.py").read_bytes()
    assert record["sources"]["kernels/norm.py"] == hashlib.sha256(kernel).hexdigest()
    (row,) = record["kernels"]
    assert row["name"].startswith("norm_forward")
    assert row["capability"] == 90
    assert row["registers"] > 0
    assert not row["error"]
    for ceiling, unit in (("copy", "GB/s"), ("matmul", "TFLOP/s")):
        measured = record["ceilings"][ceiling]
        assert min(measured["samples"]) <= measured[unit] <= max(measured["samples"])
    throughput = record["training"]["tiny"]["throughput"]
    assert throughput.keys() == {"tfm-bf16", "eager-bf16", "compile-bf16"}
    assert all(len(contender["repeats"]) == 3 for contender in throughput.values()), throughput
    *rows, last = (row for row in record["parts"] if HAS_COMPILER or row["name"] != "native")
    assert all(row["seconds"] > 0 and row["state"] in ("done", "failed") for row in rows), done.stdout
    assert record["native"].get("cpu") == ("" if HAS_COMPILER else None), record["native"]
    assert (last["state"], last["reason"]) == ("missing", "BLEU needs real text: --data names none")
    assert all(f"  {row['name']}: {row['state']}" in done.stdout for row in record["parts"])


def test_tests_are_counted_and_failures_kept(rehearsed):
    record, done = rehearsed
    tests = record["tests"]
    assert [tests[name] for name in ("passed", "failed", "skipped", "not_run")] == [1, 1, 1, 0]
    (failure,) = tests["failures"]
    assert failure["test"] == "tests/norm/test_norm.py::test_fails"
    assert failure["message"] == "ValueError: not the same numbers"
    assert "def test_fails(kernel_device)" in failure["detail"]
    assert done.returncode == 1


def test_the_sanitizer_watches_the_operations(rehearsed):
    record, _ = rehearsed
    assert record["sanitizer"]["memcheck"]["state"] == "done", record["sanitizer"]
    assert record["sanitizer"]["memcheck"]["errors"] == 0
    dtypes = {"triton": ("float32", "float16", "bfloat16")}
    if HAS_COMPILER:
        dtypes["native"] = ("float32", "bfloat16")
    names = "layer_norm", "residual_layer_norm", "rms_norm", "residual_rms_norm"
    passes = [f"{backend} {name} {dtype}" for backend in dtypes for name in names for dtype in dtypes[backend]]
    assert record["sanitizer"]["memcheck"]["passes"] == record["sanitizer"]["racecheck"]["passes"] == passes
    # The script knows no races: a tool that sums up nothing has not done its work.
    assert record["sanitizer"]["racecheck"]["state"] == "failed"
    assert "without a summary" in record["sanitizer"]["racecheck"]["reason"]


def test_a_benchmark_keeps_every_sample_and_its_share(rehearsed):
    record, _ = rehearsed
    entries = [entry for entry in record["benchmarks"] if entry["extra_info"]["suite"] == "layer_norm"]
    measured = [entry for entry in entries if "failed" not in entry["extra_info"]]
    assert len({entry["fullname"] for entry in entries}) == len(entries)
    assert all(len(entry["stats"]["data"]) == entry["stats"]["rounds"] for entry in measured)
    assert all(entry["extra_info"]["share"] > 0 for entry in measured)
    ours = [entry["extra_info"] for entry in measured if entry["extra_info"]["peer"] == "ours"]
    assert {(info["direction"], info["mode"]) for info in ours} >= {
        (direction, mode) for direction in ("forward", "forward and backward") for mode in ("eager", "graph")
    }
    assert all({"eager", "compile"} <= info["speed_up"].keys() for info in ours)
    assert all(("ours, native" in info["speed_up"]) == HAS_COMPILER for info in ours)


def test_what_fails_leaves_the_rest(rehearsed):
    record, _ = rehearsed
    parts = {row["name"]: row for row in record["parts"]}
    assert parts["broken"]["state"] == "failed"
    assert "a peer that moved" in parts["broken"]["reason"]
    assert "bench_broken.py" in parts["broken"]["output"][0]
    assert parts["norm"]["state"] == parts["training tiny"]["state"] == "done", parts


def test_each_suites_worst_case_is_profiled_by_itself(rehearsed):
    record, done = rehearsed
    assert {row["suite"] for row in record["profile"]} == {"layer_norm", "rms_norm"}
    shares = {entry["fullname"]: entry["extra_info"].get("share") for entry in record["benchmarks"]}
    for row in record["profile"]:
        assert row["state"] == "done", row
        assert row["share"] == shares[row["case"]]
        assert [kernel["launches"] for kernel in row["kernels"]] == [1, 2]
        case = f"{row['suite']} {row['size']} {row['direction']} {row['peer']}"
        assert f"{case}, cutlass::device_kernel: latency (" in done.stdout


def test_a_suite_keeps_what_it_finished(checkout, tmp_path, monkeypatch):
    run = a_run(tmp_path, rehearse=True)
    journal, now = tmp_path / "bench_troubled.jsonl", time.perf_counter

    def leaping() -> float:
        """Time is up as soon as the late case has begun."""
        return now() + 1e4 * (journal.exists() and "[late]" in journal.read_text())

    monkeypatch.setattr(time, "perf_counter", leaping)
    monkeypatch.setattr(child, "ROOT", checkout)
    state, reason = speed.suite(run, 500.0, "troubled")
    assert state == "out of time"
    assert "1 cases measured, 3 failed, 1 not run" in reason
    assert {entry["extra_info"]["peer"]: entry["extra_info"].get("failed") for entry in run.record["benchmarks"]} == {
        "dies": "its process ended by signal 11",
        "fails": "ZeroDivisionError: integer division or modulo by zero",
        "goes on": None,
        "late": "out of time",
    }
