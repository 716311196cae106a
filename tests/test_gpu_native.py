"""The part "native" of `make gpu`, and csrc beside Triton in the parts behind it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from measured import ENTRIES, FakeBenchmark, case, entry, gpu_record
from native import Called
from rich.console import Console

from benchmarks import bench_attention, bench_feed_forward, bench_norm
from benchmarks.measure import measure
from benchmarks.shapes import BERT, LONG, T5, FeedForward, Norm, Sentences, Sequences
from benchmarks.suite import BOTH, FORWARD, OURS, Case, Peer
from tfm.native import build, recipe, toolchain
from tools.gpu import child, native, proof, table
from tools.gpu.run import Options, Run, subject
from tools.report import charts
from tools.report.sources import sources_of

ROOT = Path(__file__).parent.parent
NATIVE = f"{OURS}, native"
SOURCE = """
extern "C" __global__ void __launch_bounds__(64) turn(float* x) { x[63 - threadIdx.x] = 2 * x[threadIdx.x]; }
"""


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """Sources of a line, and a cache of their own."""
    folder = tmp_path / "csrc"
    (folder / "cuda").mkdir(parents=True)
    (folder / "module.cpp").write_text("int answer() { return 1; }\n")
    (folder / "cuda" / "turn.cu").write_text(SOURCE)
    for name in ("TFM_NATIVE", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFM_BUILD_CUDA", "0")
    monkeypatch.setattr(recipe, "sources", lambda: folder)
    monkeypatch.setattr(native, "why_unavailable", lambda: {"cpu": "", "cuda": "built without CUDA"})
    return folder


@pytest.fixture
def part(tmp_path, monkeypatch):
    """part(rehearse=...): the run behind it, how it ended and why; its process is a call of its main."""

    def called(command, seconds):
        monkeypatch.setenv(child.JOURNAL, str(command.journal))
        # What the process would change of its environment ends with it.
        with pytest.MonkeyPatch.context() as own:
            for name in ("TFM_NATIVE", "CUDA_HOME"):
                own.setenv(name, os.environ.get(name, ""))
            try:
                native.main()
            except SystemExit as error:
                return child.End(1, 1.0, f"exit status 1: {error}")
        return child.End(0, 1.0, "")

    def run_part(rehearse):
        options = Options(tmp_path / "record.json", ("layer_norm",), minutes=9, rehearse=rehearse)
        run = Run(options, tmp_path, started=time.perf_counter())
        return run, *native.part(run, 60.0)

    monkeypatch.setattr(child, "run_one", called)
    return run_part


needs_compiler = pytest.mark.skipif(bool(toolchain.missing()), reason=toolchain.missing())


@needs_compiler
def test_what_follows_takes_the_library_that_was_built(csrc, part):
    run, state, reason = part(rehearse=True)
    found = run.record["native"]
    assert (state, found["is_new"], found["gencode"], found["cpu"]) == ("done", True, [], "")
    assert re.fullmatch(r"built in \d+ s", reason)
    assert "Free Software" in found["compilers"][0] or "clang" in found["compilers"][0]
    assert Path(found["library"]).is_file()
    assert run.command("tests").environment["TFM_NATIVE"] == found["library"]
    run, state, reason = part(rehearse=False)
    assert (state, reason) == ("missing", "built without CUDA; not wanted")
    assert not run.record["native"]["is_new"]


@needs_compiler
def test_sources_that_do_not_compile_fail_with_the_compilers_words(csrc, part):
    (csrc / "module.cpp").write_text("int answer() { return nothing; }\n")
    run, state, reason = part(rehearse=True)
    assert state == "failed"
    assert "csrc/module.cpp:1:" in reason
    assert "nothing" in reason
    assert "TFM_NATIVE" not in run.command("tests").environment


def test_a_library_that_is_named_is_taken(csrc, part, monkeypatch):
    monkeypatch.setenv("TFM_NATIVE", "/some/library.so")
    monkeypatch.setattr(build, "build", lambda **_: pytest.fail("built"))
    run, state, _ = part(rehearse=True)
    assert (state, run.record["native"]["library"]) == ("done", "/some/library.so")


def test_without_a_compiler_the_part_says_so(csrc, part, monkeypatch):
    monkeypatch.setattr(toolchain, "missing", lambda: "no ninja: looked for it")
    run, state, reason = part(rehearse=False)
    assert (state, reason, run.native) == ("missing", "no ninja: looked for it", None)


def test_out_of_time_leaves_no_library(csrc, part, monkeypatch):
    monkeypatch.setattr(child, "run_one", lambda *_: child.End(None, 9.0, "stopped after 9 s"))
    run, state, reason = part(rehearse=False)
    assert (state, reason, run.native) == ("out of time", "stopped after 9 s", None)


def test_nvcc_is_found_where_toolkits_are_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(native.record, "cuda_tool", lambda name: str(tmp_path / "bin" / name))
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: (None, "no nvcc in CUDA_HOME or on PATH"))
    monkeypatch.setenv("CUDA_HOME", "")
    native.find_toolkit()
    assert os.environ["CUDA_HOME"] == str(tmp_path)


@needs_compiler
@pytest.mark.skipif(toolchain.find_nvcc()[0] is None, reason=toolchain.find_nvcc()[1])
def test_on_a_gpu_kernels_are_known_with_the_library(csrc, part, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    run, _, _ = part(rehearse=False)
    (kernel,) = run.record["native"]["kernels"]
    assert (kernel["name"], kernel["capability"], kernel["num_warps"]) == ("turn.cu turn", 90, 2)
    assert kernel["registers"] > 0
    assert run.record["native"]["faults"] == []


def test_on_a_gpu_tests_of_csrc_need_its_library(tmp_path):
    """They are GPU tests there, every one, and skipped with the library's own words where it cannot run."""
    (tmp_path / "pretended.py").write_text("import torch\n\ntorch.cuda.is_available = lambda: True\n")
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_cuda_*.py") if "emulation" not in path.name)
    words = ["-q", "-p", "pretended", "-m", "gpu", "-rs", *files]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TFM_NATIVE": "/no/library.so"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert re.search(r"^\d{3} skipped in ", done.stdout, re.MULTILINE), done.stdout[-3000:]
    assert "TFM_NATIVE: expected a library, got no file at /no/library.so" in done.stdout


@pytest.mark.parametrize(
    ("suite", "size"),
    [
        (bench_norm.LAYER, Norm(5, 32, 0.1)),
        (bench_norm.RMS, Norm(5, 32)),
        (bench_feed_forward.PLAIN, FeedForward(5, 16, 24)),
        (bench_feed_forward.GATED, FeedForward(5, 16, 24, is_gated=True)),
        (bench_attention.PADDED, Sequences(2, 16, 2, 16, "lengths")),
        (bench_attention.PACKED, Sentences(3, 2, 16)),
    ],
    ids=["layer_norm", "rms_norm", "feed_forward", "gated_feed_forward", "attention", "varlen_attention"],
)
def test_the_native_way_of_ours_runs_csrc(suite, size):
    peer = Case(suite, size, BOTH, "eager", NATIVE).peer
    if reason := peer.missing():
        pytest.skip(reason)
    inputs = (peer.inputs or suite.inputs)(size)
    with peer.context(), Called() as called:
        outputs = peer.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.sum() for output in outputs).backward()
    ours = [name for name in called.names if name.startswith("tfm_native::")]
    assert any(name.endswith("_backward") for name in ours), called.names
    assert {name for name in called.names if name.startswith("tfm::")} <= {"tfm::draw_seed"}


def test_attention_is_native_where_csrc_serves_it():
    where = bench_attention.PEERS[NATIVE].where
    served = [size for size in (*BERT, *T5, *LONG) if where(size, FORWARD)]
    assert served == [size for size in BERT if size.length in (128, 256)]


def test_a_library_that_is_not_there_is_no_failure_of_ours():
    benchmark, peer = FakeBenchmark(), Peer(lambda x: x, missing=lambda: "tfm_native is not built")
    with pytest.raises(pytest.xfail.Exception):
        measure(benchmark, case(peer, name=NATIVE))
    assert benchmark.extra_info["failed"] == "tfm_native is not built"


def test_the_sanitizers_verdict_says_what_was_missing(tmp_path):
    command = child.Command((), tmp_path / "journal.jsonl", {})
    command.output.write_text("========= ERROR SUMMARY: 0 errors")
    child.append(command.journal, {"passed": "triton layer_norm float16"})
    child.append(command.journal, {"missing": "native: tfm_native is not built"})
    said = proof._verdict("memcheck", command, child.End(0, 1.0, ""))
    assert (said["state"], said["passes"]) == ("done", ["triton layer_norm float16"])
    assert said["reason"] == "0 errors; native: tfm_native is not built"


def test_tests_of_cuda_belong_to_their_operation():
    options = Options(Path(), ("layer_norm",), minutes=9, everything=False)
    assert options.covers(subject(Path("tests/norm/test_cuda_norm.py")))
    assert not options.covers(subject(Path("tests/attention/test_cuda_short_attention.py")))


def test_the_table_gives_each_way_of_ours_a_line_and_no_way_is_a_peer_of_another():
    entries = [
        entry(OURS, 1e-5, share=0.8, speed_up={NATIVE: 0.5, "eager": 3.0, "liger": 1.5}),
        entry(NATIVE, 1e-5, share=0.9, speed_up={OURS: 2.0, "eager": 6.0, "liger": 2.5}),
        entry("eager", 1e-5), entry("liger", 1e-5), entry("flex"), {"extra_info": {"suite": "layer_norm"}},
    ]  # fmt: skip
    printed = io.StringIO()
    table.show({"parts": [], "benchmarks": entries}, Console(file=printed, width=120))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.getvalue().splitlines()]
    assert ["layer_norm", "6", "1", "80%", "1.50", "1.50", "1.50"] in lines
    assert ["layer_norm, native", "1", "0", "90%", "2.50", "2.50", "2.50"] in lines


def test_the_chart_holds_peers_against_what_a_call_takes_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "_png", lambda figure: figure)
    record = gpu_record(tmp_path, benchmarks=[*ENTRIES[:2], entry(NATIVE, 40e-6)])
    (points,) = charts.speed_up(record).axes[0].collections
    # Below the heading of its suite.
    assert points.get_offsets().tolist() == [[2.5, 1.0]]


def test_numbers_of_csrc_on_a_gpu_rest_upon_its_sources(tmp_path):
    measured = gpu_record(tmp_path).data["sources"]
    assert gpu_record(tmp_path, benchmarks=[*ENTRIES, entry(NATIVE)]).changed_sources("layer_norm") == []
    changed = gpu_record(tmp_path, benchmarks=[*ENTRIES, entry(NATIVE, 1e-5)]).changed_sources("layer_norm")
    assert {"csrc/cuda/norm.cu", "csrc/cuda/sums.cuh", "csrc/common/philox.h"} <= set(changed)
    assert not set(changed) & measured.keys()
    reached = {name for name in sources_of("attention", folder="csrc/cuda") if name.endswith(".cu")}
    assert reached == {"csrc/cuda/attention/short.cu", "csrc/cuda/attention/mask_bits.cu"}
