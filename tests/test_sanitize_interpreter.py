"""Every Triton kernel under the memory checker: clean, and nothing of it left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from selection import long_but

from tfm import ops
from tfm.ops import backends
from tools.interpreter import memory
from tools.interpreter.findings import Finding, Findings, from_root
from tools.sanitize import every_kernel, interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not in the interpreter")
# What takes a second or two; `make test-all` passes all, `make sanitize` in every dtype.
QUICK = ["decode_attention", "feed_forward", "layer_norm", "linear_cross_entropy", "rms_norm", "rotary_"]


@pytest.mark.parametrize("operation", long_but(QUICK, every_kernel.passes()))
def test_kernels_are_clean(operation):
    findings, kernels = interpreter.check(operation, torch.float16)
    assert [str(finding) for finding in findings] == []
    assert all(checked.elements for checked in kernels.values())


def test_memory_that_an_operator_allocates_is_known_to_be_unwritten(monkeypatch):
    monkeypatch.setattr(torch, "zeros", torch.empty)  # Wide rows' partial sums begin at 0.
    x, weight = torch.ones(2, 8193, requires_grad=True), torch.ones(8193, requires_grad=True)
    with memory.checked() as checker, backends.use("triton"):
        torch.autograd.grad(ops.rms_norm(x, weight), [x, weight], torch.ones_like(x))
    (finding,) = checker.findings
    assert (finding.kind, finding.kernel) == ("unwritten", "norm_backward_kernel")
    assert finding.tensor.startswith("partials ")


SOURCE = """
@triton.jit
def inner(pointer):
    return tl.load(
        pointer
    )

@triton.jit(do_not_specialize=["y"])
def outer_kernel(x, y):
    tl.store(y, inner(x))
    tl.atomic_add(y, 1)
    x.load([0])

def launch(x, y):
    outer_kernel[(1,)](x, y)
    tables[0](x)
    torch.load(x)
"""


class Pass:
    """A pass over SOURCE, as if a run had brought what is given: its exit status, and what it printed."""

    def __init__(self, file: Path, monkeypatch, capsys) -> None:
        file.write_text(SOURCE)
        self.monkeypatch, self.capsys = monkeypatch, capsys
        monkeypatch.setattr(interpreter, "KERNELS", [file])
        monkeypatch.setattr(interpreter, "UNREACHABLE", {})
        lines = [((5, "inner"), (10, "outer_kernel")), ((11, "outer_kernel"),), ((12, "outer_kernel"),)]
        self.places = [tuple((str(file), *line) for line in place) for place in lines]

    def __call__(self, findings=(), kernels=("outer_kernel",), places=None):
        found, places = Findings(), set(self.places if places is None else places)
        for finding in findings:
            found.add(finding)
        checked = {kernel: memory.Checked(1, 3, 35, places) for kernel in kernels}
        self.monkeypatch.setattr(interpreter, "check_all", lambda only: (found, checked))
        return interpreter.main([]), self.capsys.readouterr().out.splitlines()


@pytest.fixture
def run_pass(tmp_path, monkeypatch, capsys):
    return Pass(tmp_path / "launching.py", monkeypatch, capsys)


def test_pass_without_findings_is_clean(run_pass):
    status, lines = run_pass()
    assert status == 0
    assert lines[1].split() == ["outer_kernel", "1", "3", "35", "0"]
    assert lines[-1].startswith("clean: ")


def test_finding_fails_the_pass(run_pass):
    programs, places = ((1, 0, 0), (0, 0, 0)), (run_pass.places[0],)
    finding = Finding("race", "outer_kernel", "y []", "writes element 0", programs, places, 7)
    status, lines = run_pass([finding])
    assert status == 1
    assert lines[1].split() == ["outer_kernel", "1", "3", "35", "1"]
    assert lines[-1] == str(finding)
    assert lines[-1].startswith(
        "race: outer_kernel, y []: writes element 0 (7 in all); programs (1, 0, 0) and (0, 0, 0)"
    )
    assert re.search(r"launching.py:5 in inner, from \S*launching.py:10$", lines[-1])


def test_kernel_that_is_never_launched_fails_the_pass(run_pass):
    status, lines = run_pass(kernels=(), places=())
    assert status == 1
    assert "never launched: outer_kernel" in lines
    assert not any("tables" in line for line in lines)


@pytest.mark.parametrize(
    ("missing", "lines"),
    [
        (
            0,
            [
                "4 in inner: tl.load(pointer)",
                "10 in outer_kernel: tl.store(y, inner(x))",
                "10 in outer_kernel: inner(x)",
            ],
        ),
        (1, ["11 in outer_kernel: tl.atomic_add(y, 1)"]),
        (2, ["12 in outer_kernel: x.load([0])"]),
    ],
)
def test_access_that_is_never_come_to_fails_the_pass(run_pass, missing, lines):
    places = [place for number, place in enumerate(run_pass.places) if number != missing]
    status, printed = run_pass(places=places)
    assert status == 1
    found = [line.partition("launching.py:")[2] for line in printed if line.startswith("never come to: ")]
    assert sorted(found) == sorted(lines)


def test_access_may_be_excused_and_only_while_it_is_never_come_to(run_pass, monkeypatch):
    excuse = (from_root(str(interpreter.KERNELS[0])), "x.load(")
    monkeypatch.setattr(interpreter, "UNREACHABLE", {excuse: "for a reason"})
    assert run_pass(places=run_pass.places[:2])[0] == 0
    status, lines = run_pass()
    assert status == 1
    assert lines[-1] == f"come to, though excused: {excuse[0]}: x.load("


def test_where_nothing_is_interpreted_the_pass_says_so(monkeypatch, capsys):
    monkeypatch.setattr(every_kernel, "missing", lambda backend, device: "TRITON_INTERPRET was not set")
    assert interpreter.main([]) == 2
    assert capsys.readouterr().out == "not run: TRITON_INTERPRET was not set\n"
