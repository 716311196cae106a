"""What `make gpu` makes of Nsight Compute: which cases it looks at, and what it understands of the answer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.bench_norm import LAYER, RMS
from tools.gpu import profile as module
from tools.gpu.profile import bound, brief, find, kernels, ncu, profile, worst
from tools.gpu.run import Options, Run

OUTPUT = (Path(__file__).parent / "ncu_output.txt").read_text()
REFUSED = """#!/bin/sh
echo "==PROF== Connected to process 4711 (/usr/bin/python3.12)"
echo "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
echo "==PROF== Disconnected from process 4711"
exit 1
"""
FOUND_NOTHING = """#!/bin/sh
echo "==WARNING== No kernels were profiled."
"""


def entry(suite, share, peer="ours", mode="graph", launch_bound=True, **extra):
    facts = {"suite": suite, "size": "8x8", "direction": "forward", "peer": peer, "mode": mode, "share": share}
    name = f"benchmarks/bench_{suite}.py::test_{suite}[8x8 forward {mode} {peer}]"
    return {"fullname": name, "extra_info": facts | {"launch_bound": launch_bound} | extra}


ENTRIES = [
    entry("rotary", 0.01, mode="eager"),
    entry("rotary", 0.6),
    entry("layer_norm", 0.02, peer="eager"),
    entry("layer_norm", 0.4),
    entry("attention", 0.2, mode="eager", launch_bound=False),
    entry("attention", 0.1, peer="ours, padded"),
    entry("embedding", 0.01, failed="out of memory"),
]


def test_the_worst_cases_are_of_two_operations():
    chosen = [(one["extra_info"]["suite"], one["extra_info"]["share"]) for one in worst(ENTRIES)]
    assert chosen == [("attention", 0.2), ("layer_norm", 0.4)]


def test_kernels_are_read_among_other_lines():
    gemm, norm = kernels(OUTPUT)
    assert brief(gemm["name"]) == "cutlass::device_kernel"
    assert (gemm["launches"], gemm["seconds"], gemm["registers"]) == (1, pytest.approx(9.632e-6), 168)
    assert list(gemm["stalls"]) == ["gmma", "long_scoreboard", "wait"]
    # Of two launches the longer one speaks; "selected" is no wait, and a part of a warp's time.
    assert (norm["launches"], norm["seconds"]) == (2, pytest.approx(8.32e-6))
    assert norm["GB/s"] == pytest.approx(2 * 8_388_608 / 4.224e-6 / 1e9)
    assert norm["DRAM %"] == pytest.approx(40.1 + 39.8)
    assert norm["stalls"]["long_scoreboard"] == pytest.approx(15.3 / 20)
    assert kernels("==WARNING== No kernels were profiled.") == []


def test_other_units_are_scaled_and_unknown_ones_refused():
    micro = OUTPUT.replace('"ns"', '"us"').replace('"byte"', '"Kbyte"')
    assert kernels(micro)[0]["seconds"] == pytest.approx(9.632e-3)
    assert kernels(micro)[0]["GB/s"] == pytest.approx(kernels(OUTPUT)[0]["GB/s"])
    with pytest.raises(ValueError, match=r"gpu__time_duration.sum: expected one of ns, .*, got 'cycle'"):
        kernels(OUTPUT.replace('"ns"', '"cycle"'))
    with pytest.raises(ValueError, match="expected a duration of layer_norm_forward_kernel, got none"):
        kernels(OUTPUT.replace('"4,096"', '"n/a"'))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"DRAM %": 81.0, "SM %": 82.0}, "memory ("),
        ({"L2 %": 70.0}, "memory, in L2 ("),
        ({"tensor %": 72.1, "SM %": 72.3}, "tensor cores ("),
        ({"SM %": 66.0}, "instructions ("),
        ({"waves": 0.25}, "latency (DRAM 0%, L2 10%, tensor 10%, SM 10% of peak); its blocks fill 25% of the GPU once"),
        ({"stalls": {"barrier": 0.4}}, "; warps wait 40% of their time for the other warps of their block"),
    ],
)
def test_what_bounds_a_kernel(changes, said):
    idle = {"DRAM %": None, "L2 %": 10.0, "tensor %": 10.0, "SM %": 10.0, "waves": 2.0, "stalls": {}}
    assert said in bound(idle | changes)


@pytest.fixture
def run(tmp_path) -> Run:
    options = Options(out=tmp_path / "record.json", suites=("layer_norm",), minutes=9, rehearse=True)
    run = Run(options, tmp_path, started=time.perf_counter())
    run.record["benchmarks"] = ENTRIES
    return run


def test_without_ncu_or_cases(run, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "cuda_tool", lambda name: None)
    monkeypatch.setattr(module, "INSTALLED", tmp_path)
    assert profile(run, 10.0) == ("missing", f"no ncu on PATH, in /usr/local/cuda/bin or in {tmp_path}")
    run.record["benchmarks"] = []
    assert profile(run, 10.0)[0] == "missing"
    for version in ("2025.3.1", "2025.10.0", "2024.1.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch()
    assert ncu() == str(tmp_path / "2025.10.0" / "ncu")


@pytest.mark.parametrize(
    ("script", "said"),
    [(REFUSED, "ERR_NVGPUCTRPERM - The user does not have permission"), (FOUND_NOTHING, "ncu saw no kernel")],
    ids=["refused", "found-nothing"],
)
def test_ncu_that_fails_says_why(script, said, run, monkeypatch, tmp_path):
    tool = tmp_path / "ncu"
    tool.write_text(script)
    tool.chmod(0o755)
    monkeypatch.setattr(record, "cuda_tool", lambda name: str(tool))
    state, reason = profile(run, 20.0)
    assert state == "failed"
    assert f"attention: {said}" in reason
    assert [row["state"] for row in run.record["profile"]] == ["failed", "failed"]


def test_a_case_is_found_by_its_name_in_the_record():
    for suite in (LAYER, RMS):
        case = suite.cases()[-1]
        assert find(f"benchmarks/bench_norm.py::test_{suite.operation}[{case}]") == case
    with pytest.raises(ValueError, match="expected one of its cases, got 'nonsense'"):
        find("benchmarks/bench_norm.py::test_layer_norm[nonsense]")
