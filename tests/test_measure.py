"""Benchmarks tell the truth about time, keep what failed, and run on a GPU as they are rehearsed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import FakeBenchmark, case
from native import WHY_UNAVAILABLE

from benchmarks import measure as timing
from benchmarks.measure import ROUND_SECONDS, Replays, Turns, Unavailable, calibrate, input_sets, measure
from benchmarks.peers import LINEAR_CROSS_ENTROPY
from benchmarks.suite import BOTH, FORWARD, OURS, Peer, Suite
from benchmarks.summary import add_speed_ups, case_of, failures

ROOT = Path(__file__).parent.parent


@dataclass
class FakeTime:
    """A clock that only steps move."""

    now: float = 0.0

    def clock(self) -> float:
        return self.now

    def step(self, seconds: float) -> Callable[[], None]:
        def step() -> None:
            self.now += seconds

        return step


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("seconds", [2e-8, 3e-6, 4.9e-4, 1e-3, 0.2])
def test_a_round_lasts_a_millisecond_and_not_much_more(seconds: float, multiple: int) -> None:
    time = FakeTime()
    calls, round_seconds = calibrate(time.step(seconds), multiple, time.clock)
    assert calls % multiple == 0
    assert round_seconds == pytest.approx(calls * seconds)
    assert round_seconds >= ROUND_SECONDS
    assert round_seconds <= max(2.5 * ROUND_SECONDS, 2.5 * multiple * seconds)


def test_replays_of_a_graph_count_as_the_calls_it_holds() -> None:
    time = FakeTime()
    held = 8
    calls, round_seconds = calibrate(Replays(time.step(held * 7e-6), held), held, time.clock)
    assert round_seconds / calls == pytest.approx(7e-6)


def test_calls_take_turns_among_the_inputs() -> None:
    seen: list[int] = []
    turns = Turns([lambda place=place: seen.append(place) for place in range(3)])
    for _ in range(7):
        turns()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_inputs_exceed_the_cache_twice() -> None:
    cache = 50 << 20
    for size in (1 << 20, 8 << 20, 60 << 20, 200 << 20):
        sets = input_sets(size, cache)
        assert sets * size > 2 * cache or sets == timing.MOST_INPUTS
        assert (sets - 1) * size <= 2 * cache
    assert input_sets(1 << 20, 0) == 1


def test_gradients_are_those_of_every_input_that_needs_one() -> None:
    asked: list[bool] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        asked.append(torch.is_grad_enabled() and x.requires_grad)
        return 2 * x

    for direction, with_gradient in ((FORWARD, False), (BOTH, True)):
        benchmark = FakeBenchmark()
        measure(benchmark, case(Peer(double), direction=direction))
        assert set(asked) == {with_gradient}
        assert "failed" not in benchmark.extra_info
        asked.clear()


def failing(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel\nand a long story")


def test_a_peer_that_fails_is_a_result() -> None:
    for peer, reason in (
        (Peer(failing), "RuntimeError: no such kernel"),
        (Peer(lambda x: x, missing=lambda: "not installed"), "not installed"),
    ):
        benchmark = FakeBenchmark()
        with pytest.raises(pytest.xfail.Exception, match=reason):
            measure(benchmark, case(peer))
        assert benchmark.extra_info["failed"] == reason
        assert benchmark.extra_info["peer"] == "a peer"
        assert benchmark.has_error


def test_ours_that_fails_is_a_failure_and_says_why() -> None:
    benchmark = FakeBenchmark()
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure(benchmark, case(Peer(failing), name=OURS))
    assert benchmark.extra_info["failed"] == "RuntimeError: no such kernel"


def test_a_failure_names_the_exception_behind_the_compiler() -> None:
    error = RuntimeError("compilation failed")
    error.__cause__ = Unavailable("no backward")
    assert timing.failure(error) == "no backward"


def entry(peer: str, seconds: float | None, mode: str = "eager") -> dict[str, Any]:
    info = {"suite": "norm", "size": "3", "direction": FORWARD, "mode": mode, "peer": peer}
    if seconds is None:
        return {"extra_info": info | {"failed": "why"}, "stats": None}
    return {"extra_info": info, "stats": {"median": seconds}}


def test_speed_up_is_the_peers_time_over_ours() -> None:
    entries = [entry(OURS, 2.0), entry("eager", 3.0), entry("liger", None), entry("eager", 1.0, "graph")]
    entries.append({"extra_info": {"failed": "its process died"}, "stats": None})
    add_speed_ups(entries)
    assert entries[0]["extra_info"]["speed_up"] == {"eager": 1.5}
    assert not any("speed_up" in entry["extra_info"] for entry in entries[1:])
    assert list(failures(entries)) == ["norm, liger failed: why (1 cases)"]


# Of a rehearsal on a CPU: what has no kernel there, and what is not installed here.
NO_CPU_KERNEL = {"sdpa flash", "sdpa efficient", "sdpa cudnn", "torch varlen", "flex"}
NOT_HERE = {
    peer: reason
    for peer, reason in (
        ("liger", "liger_kernel is not installed"),
        ("ours, native", WHY_UNAVAILABLE),
        ("torch's fused", LINEAR_CROSS_ENTROPY["torch's fused"].missing()),
    )
    if reason
}


def test_a_rehearsal_takes_every_path_of_a_gpu(tmp_path: Path) -> None:
    """Every suite at its first tiny size, beside every peer, in the interpreter; what becomes of it in the record.

    Graphs, which a rehearsal replays as calls, of the norms alone: the others would do the same once more.
    """
    ceilings = tmp_path / "ceilings.json"
    ceilings.write_text(json.dumps({"copy": 1.0, "matmul": 0.001}))
    variables = {"TFM_REHEARSAL": "1", "TFM_QUICK": "1", "TFM_CEILINGS": str(ceilings), "CUDA_VISIBLE_DEVICES": ""}
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-o", "python_files=bench_*.py", "-q", "-W", "ignore"]
    command += ["-k", "(not graph or norm) and not training", "--benchmark-enable", f"--benchmark-json={record}"]
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=inherited | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    entries = json.loads(record.read_text())["benchmarks"]
    rows = [entry["extra_info"] for entry in entries]
    modules = [import_module(f"benchmarks.{path.stem}") for path in (ROOT / "benchmarks").glob("bench_*.py")]
    suites = {value.operation for module in modules for value in vars(module).values() if isinstance(value, Suite)}
    assert {row["suite"] for row in rows} == suites
    assert {row["mode"] for row in rows} == {"eager", "graph"}
    for row in rows:
        reason = row.get("failed")
        if row["peer"] in NOT_HERE:
            assert reason == NOT_HERE[row["peer"]]
        elif reason is not None:
            assert row["peer"] in NO_CPU_KERNEL, reason
            # Dynamo of torch 2.11 passes on the type of what it traced into, not the words.
            assert "CPU" in reason or "kernel" in reason or "NotImplementedError" in reason, reason
        else:
            assert row["events_seconds"] > 0
            assert row["share"] > 0
    assert len({(*case_of(entry), entry["extra_info"]["peer"]) for entry in entries}) == len(entries)
    for entry in entries:
        info = entry["extra_info"]
        if info["peer"] == OURS:
            assert info["speed_up"]["eager"] > 0
            assert entry["stats"]["data"]
    assert "failed: liger_kernel is not installed" in run.stdout
