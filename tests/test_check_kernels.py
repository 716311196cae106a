"""The cross-compiler's check: it lists every argument, and fails where a kernel must not ship."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import check_kernels
from benchmarks.check_kernels import SHARED_LIMITS, Usage

# One warp holds 32 x 255 values; the first tile's do not fit.
CASES = """
import triton
import triton.language as tl

from benchmarks.kernel_cases.case import Case


@triton.jit
def normalise(x, y, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    value = tl.load(x + column)
    tl.store(y + column, value / tl.sum(value))


def cases(every):
    for columns in (16384, 64):
        yield Case(f"normalise {columns}", normalise, {"x": "*fp32:16", "y": "*fp32:16", "COLUMNS": columns}, 1)


ALL = (cases,)
"""


def test_a_spill_fails(tmp_path):
    (tmp_path / "spilling_cases.py").write_text(CASES)
    root = Path(check_kernels.__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks.check_kernels", "--cases", "spilling_cases"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)]),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("normalise")]
    assert [line.split()[:3] for line in lines] == [
        ["normalise", columns, chip] for columns in ("16384", "64") for chip in ("sm_80", "sm_90", "sm_100")
    ]
    assert ["spills" in line for line in lines] == [True] * 3 + [False] * 3
    assert "6 compilations" in done.stdout
    assert "3 of them must not ship" in done.stdout


def test_too_much_shared_memory_is_refused():
    for capability, limit in SHARED_LIMITS.items():
        fits = Usage("kernel", capability, num_warps=4, registers=64, stack=0, shared=limit)
        assert not fits.complaint
        above = Usage("kernel", capability, num_warps=4, registers=64, stack=0, shared=limit + 1)
        assert above.complaint == f"expected at most {limit} bytes of shared memory"
        assert str(above).endswith(above.complaint)


def test_cases_name_every_argument():
    for every in (False, True):
        cases = check_kernels.cases_of("benchmarks.kernel_cases", every)
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert set(case.arguments) == set(case.kernel.arg_names), case.name
