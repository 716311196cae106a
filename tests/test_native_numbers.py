"""Every function of one number that the CPU kernels compute themselves errs by at most 2 units in the last place."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import native
import pytest

from tfm.native import recipe

pytestmark = native.MARKS
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
def test_functions_err_by_two_units_at_most(instruction_set, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("compiles a program, and there is no g++")
    flags = (*recipe.HOST_FLAGS, f"-DTFM_ISA={instruction_set}", *recipe.variants()[instruction_set])
    program = tmp_path / "numbers"
    source = ROOT / "tests" / "native_numbers" / "main.cpp"
    subprocess.run(["g++", *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {name: float(units) for name, units in (line.rsplit(" ", 1) for line in lines)}
    assert len(found) == 11
    assert max(found.values()) <= 2, found
