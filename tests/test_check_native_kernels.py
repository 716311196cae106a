"""The check of csrc/cuda's kernels: nvcc's numbers under readable names, and a fault where one spills."""

from __future__ import annotations

from pathlib import Path

import pytest

from tfm.native import toolchain
from tools.check_kernels import __main__ as command
from tools.check_kernels import native
from tools.check_kernels.allowed import Allowed
from tools.check_kernels.verdict import verdict

NVCC, WHY_NOT = toolchain.find_nvcc()
SOURCE = """
#include "common/rows.h"
namespace tfm { namespace {
template <class T, int N> __global__ void __launch_bounds__(64) scale(T* x, float by) {
    __shared__ float shared[ROWS];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = shared[ROWS - 1 - threadIdx.x] * by * N;
}
__global__ void __launch_bounds__(1024) spills(float* x, int n) {
    float values[200];
    for (int i = 0; i < 200; ++i) values[i] = x[i * 1024 + threadIdx.x];
    for (int k = 0; k < n; ++k)
        for (int i = 0; i < 200; ++i) values[i] *= values[(7 * i + k) % 200];
    for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = values[i];
}
template __global__ void scale<float, 4>(float*, float);
__global__ void turn(float* x) {
    extern __shared__ float any[];
    any[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = any[blockDim.x - 1 - threadIdx.x];
}
} }
"""

needs_nvcc = pytest.mark.skipif(NVCC is None, reason=WHY_NOT)


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "csrc"
    for name, text in (("cuda/some.cu", SOURCE), ("common/rows.h", "constexpr int ROWS = 64;\n")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    return folder


@needs_nvcc
def test_registers_shared_memory_and_spills_are_found_once(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NVCC is not None
    seen: list[object] = []
    rows = native.compile_all(NVCC, (80, 90), csrc=csrc, report=seen.append)
    assert seen == rows
    assert [(row.name, row.capability) for row in rows] == [
        (f"some.cu {name}", chip) for name in ("scale<float, 4>", "spills", "turn, dynamic shared") for chip in (80, 90)
    ]
    scale, _, spills, _, turn, _ = rows
    assert (turn.num_warps, turn.shared) == (32, 0)  # no bounds given
    assert (scale.num_warps, scale.shared, scale.stack, scale.faults) == (2, 256, 0, {})
    assert scale.instructions == {"LDG.32": 1, "STG.32": 1}
    assert (spills.num_warps, spills.faults.keys()) == (32, {"spill"})
    excused = Allowed((spills.name,), (80, 90), "spill", reason="")
    assert len(verdict(rows, (), whole=True)) == 2
    assert verdict(rows, (excused,), whole=True) == []
    assert native.concerns(excused)
    # What is unchanged is not compiled again; a header counts.
    monkeypatch.setattr(native, "_compile_anew", lambda *_: pytest.fail("compiled again"))
    again = native.compile_all(NVCC, (80, 90), csrc=csrc, only=("scale",))
    assert [row.registers for row in again] == [row.registers for row in rows[:2]]
    (csrc / "common" / "rows.h").write_text("constexpr int ROWS = 32;\n")
    with pytest.raises(pytest.fail.Exception):
        native.compile_all(NVCC, (80,), csrc=csrc)


@needs_nvcc
def test_what_does_not_compile_is_a_fault_not_an_end(csrc: Path) -> None:
    assert NVCC is not None
    (csrc / "common" / "rows.h").write_text("constexpr int ROWS = nothing;\n")
    (row,) = native.compile_all(NVCC, (80,), csrc=csrc)
    assert "nothing" in row.faults["error"]
    assert row.name.startswith("some.cu")


def test_without_nvcc_triton_is_checked_alone_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: (None, "no nvcc in CUDA_HOME or on PATH"))
    monkeypatch.setattr(command, "compile_all", lambda *_, **__: [native.Compiled("one", 80, num_warps=4)])
    monkeypatch.setattr(command.sys, "argv", ["check_kernels"])
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert "csrc/cuda was not compiled: no nvcc in CUDA_HOME or on PATH\n" in printed
