"""Each of examples/ runs on a CPU in seconds, is short, and prints what its docstring says."""

from __future__ import annotations

import ast
import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LONGEST = 60
# What each prints, as a test of its lines.
PRINTS: dict[str, Callable[[list[str]], bool]] = {}


def prints(check: Callable[[list[str]], bool]) -> Callable[[list[str]], bool]:
    PRINTS[check.__name__] = check
    return check


def losses(lines: list[str]) -> list[float]:
    return [float(found[1]) for line in lines if (found := re.match(r"update \d+: loss (\d+\.\d+)$", line))]


@prints
def layers(lines: list[str]) -> bool:
    first, *_, last = losses(lines)
    return first > 2 and last < 1


@prints
def huggingface(lines: list[str]) -> bool:
    said = "\n".join(lines)
    first, *_, last = losses(lines)
    fused = "replaced 25 modules\n  6 x attention:" in said and "attention: 360 calls fused, 0 as before" in said
    return fused and last < first and lines[-1] == "restored, it says the same: True"


@prints
def drop_in(lines: list[str]) -> bool:
    said = "\n".join(lines)
    difference = float(re.search(r"^largest difference (\S+)$", said, re.MULTILINE)[1])
    left = "left 1 module\n  norm (ScaledNorm): a subclass of torch.nn.LayerNorm, whose own code might be lost"
    return said.startswith("replaced 13 modules\n") and left in said and difference < 1e-5


@prints
def operations(lines: list[str]) -> bool:
    first, *_, last = losses(lines)
    return first > 5 and last < 2.5


@prints
def translation(lines: list[str]) -> bool:
    found = losses(lines)
    return len(found) == 4 and found[-1] < found[0] and sum(" -> " in line for line in lines) == 3


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_is_short_and_says_what_it_prints(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST
    assert "Prints " in (ast.get_docstring(ast.parse(source)) or "")


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert PRINTS[name](lines), "\n".join(lines)
