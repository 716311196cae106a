"""Stand-ins for what is measured: a benchmark and its case, the entries and the record that it leaves, a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.suite import FORWARD, Case, Peer, Suite, Work
from tools.gpu.run import Options, Run
from tools.report.records import ROOT, Record, sha256
from tools.report.sources import sources_of

CEILINGS = {"copy": {"GB/s": 4300.0, "samples": [4300.0]}, "matmul": {"TFLOP/s": 780.0, "samples": [780.0]}}


@dataclass
class FakeBenchmark:
    """As much of pytest-benchmark's fixture as `measure` uses; runs nothing but what it is given."""

    enabled: bool = True
    stats: None = None
    has_error: bool = False
    extra_info: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, int]] = field(default_factory=list)

    def pedantic(self, step: Callable[[], None], rounds: int, iterations: int) -> None:
        self.runs.append({"rounds": rounds, "iterations": iterations})
        step()


def case(peer: Peer, name: str = "a peer", direction: str = FORWARD, mode: str = "eager") -> Case:
    peers = {name: peer}
    suite = Suite(
        "doubling", ["3"], peers, lambda size: (torch.ones(3, requires_grad=True),), lambda *_: Work(bytes=24)
    )
    return Case(suite, "3", direction, mode, name)


def entry(peer, seconds=None, mode="eager", suite="layer_norm", **extra):
    """An entry as a suite leaves it; without seconds, of a peer that failed."""
    facts = {"suite": suite, "direction": "forward", "size": "4096x512", "peer": peer, "mode": mode}
    facts |= {"failed": "out of memory"} if seconds is None else {"GB/s": 0.016 / seconds, "share": 0.5}
    stats = None if seconds is None else {"median": seconds, "data": [seconds]}
    return {"name": "test_layer_norm_forward", "extra_info": facts | {"ceiling": "copy"} | extra, "stats": stats}


ENTRIES = [
    entry("ours", 20e-6),
    entry("eager", 50e-6),
    entry("compile", 25e-6),
    entry("liger"),
    entry("ours", 8e-6, mode="graph"),
    entry("eager", 4e-3, mode="graph"),
]


def gpu_record(folder, name="h200", date="2026-01-02T00:00:00+00:00", gpu="NVIDIA H200", **changes):
    """A record of `gpu` whose sources are those of the tree."""
    sources = {source: sha256(ROOT / source) for source in sources_of("layer_norm")}
    environment = {"date": date, "gpu": gpu, "cpu": "a CPU", "torch": "2.11.0", "triton": "3.6.0", "driver": "580"}
    tests = {"passed": 1200, "failed": 1, "skipped": 3}
    data = {"format": 1, "environment": environment, "sources": sources, "ceilings": CEILINGS, "tests": tests}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data | {"benchmarks": ENTRIES} | changes))
    return Record(path, json.loads(path.read_text()))


def a_run(tmp_path, **options) -> Run:
    given = {"out": tmp_path / "record.json", "suites": ("troubled",), "minutes": 9, "everything": False} | options
    return Run(Options(**given), tmp_path, started=time.perf_counter())
