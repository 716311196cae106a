"""The tuner: it checks before it times, says what fails, keeps to its time, and prints settings to paste."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import trials, tune
from benchmarks.candidates import FAMILIES
from benchmarks.candidates.sweep import Candidate, Sweep
from benchmarks.suite import BOTH, OURS, Peer, Suite, Work
from benchmarks.trials import best_of, try_all
from tfm.kernels import launch

pytestmark = pytest.mark.triton

# Of an operation that works with 1 to 8 warps, gives wrong gradients with 16, and does not launch with 32.
EXPECTED = {2: 0.9, 4: 0.7, 16: 0.6, 32: 0.8}
TODAYS = launch.sum_partials(32)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.warps = launch.sum_partials(x.shape[-1]).num_warps
        if ctx.warps == 32:
            raise RuntimeError("out of resource: registers\nmore lines")
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy if ctx.warps < 16 else 2.1 * dy


def doubling(**changes):
    def candidates(current, arguments):
        assert arguments == {"columns": 32}
        yield Candidate(current, 1.0)
        for warps, expected in EXPECTED.items():
            yield Candidate(replace(current, num_warps=warps), expected)

    suite = Suite("double", [3], {OURS: Peer(Doubled.apply)}, lambda rows: (leaf(rows),), lambda *_: Work())
    given = {"function": "sum_partials", "suite": suite, "direction": BOTH, "sizes": [3], "rehearsal": 3}
    return Sweep(**given | {"question": "?", "prediction": "!", "candidates": candidates} | changes)


def leaf(rows):
    return torch.randn(rows, 32, requires_grad=True)


def seconds(steps):
    """Time grows with the warps in place."""
    for step in steps:
        step()
    warps = launch.sum_partials(32).num_warps
    return [warps * 1e-6, 1.1 * warps * 1e-6, 0.9 * warps * 1e-6]


def trials_of(until=float("inf"), **changes):
    clock = itertools.count().__next__
    return list(try_all(doubling(**changes), 3, torch.float32, until, clock, seconds))


def test_a_wrong_or_failing_candidate_is_said_and_not_timed():
    tried = trials_of()
    assert [trial.settings.num_warps for trial in tried] == [TODAYS.num_warps, 16, 4, 32, 2]
    assert [trial.is_current for trial in tried] == [True, False, False, False, False]
    assert [bool(trial.samples) for trial in tried] == [True, False, True, False, True]
    assert re.match(r"ValueError: result 1 errs by 5.0e-02, expected at most 1.2e-07", tried[1].reason)
    assert tried[3].reason == "RuntimeError: out of resource: registers"
    assert best_of(tried) == tried[4]
    assert launch.sum_partials(32) == TODAYS


def test_nothing_is_tried_after_the_time():
    tried = trials_of(until=3)
    assert [trial.reason for trial in tried[3:]] == ["out of time"] * 2
    assert not any(trial.samples for trial in tried[3:])
    assert all(trial.samples or trial.reason.startswith("ValueError") for trial in tried[:3])


def test_todays_settings_stay_within_their_own_spread():
    tried = trials_of()[:1]
    faster = replace(tried[0], is_current=False, samples=(min(tried[0].samples),))
    assert best_of([*tried, faster]) is None
    assert best_of([]) is None


def test_a_size_that_cannot_run_is_said():
    def inputs(rows):
        raise MemoryError("out of memory")

    (trial,) = trials_of(suite=replace(doubling().suite, inputs=inputs))
    assert trial.reason == "MemoryError: out of memory"
    (trial,) = trials_of(function="norm_forward")
    assert trial.reason == "is not called at this size"


def test_one_call_of_several_is_replaced():
    def twice(x):
        return Doubled.apply(x), launch.sum_partials(64).num_warps * Doubled.apply(x)

    suite = replace(doubling().suite, peers={OURS: Peer(twice)})
    seen = []

    def candidates(current, arguments):
        seen.append(arguments)
        return [Candidate(replace(current, num_warps=4), 0.5)]

    tried = trials_of(suite=suite, candidates=candidates)
    assert seen == [{"columns": 32}, {"columns": 64}]
    # The second call's settings are a factor of the result, so that others than today's make it wrong.
    assert [bool(trial.samples) for trial in tried] == [True, True, True, False]


@pytest.fixture
def tuner(monkeypatch):
    """The command in this process, and the environment as it was when the test ends."""
    for name in ("TFM_REHEARSAL", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")

    def run(*words, **options):
        monkeypatch.setattr(sys, "argv", ["tune", *words])
        return tune.main(**options)

    return run


def first_of(candidates):
    return lambda current, arguments: list(candidates(current, arguments))[:1]


@pytest.mark.parametrize("family", FAMILIES)
def test_rehearsal_prints_settings_to_paste(family, tuner, monkeypatch, capsys):
    # Today's settings and one candidate of each sweep, timed by one run.
    short = [replace(sweep, candidates=first_of(sweep.candidates)) for sweep in FAMILIES[family]]
    monkeypatch.setitem(FAMILIES, family, short)
    monkeypatch.setattr(trials, "ROUNDS", 1)
    monkeypatch.setattr(trials, "calibrate", lambda step, *_: (1, step()))
    assert tuner(family, "--rehearse") == 0
    printed = capsys.readouterr().out
    assert printed.count("(today's)") >= len(short)
    for sweep in short:
        assert sweep.question in printed
    for reason in ("Error", "not called", "out of time"):
        assert reason not in printed


def test_time_is_divided_among_the_sizes(tuner, capsys):
    # Ten seconds pass from each look at the clock to the next: the first of three gets a third, and none is left then.
    seconds = itertools.count(0, 10).__next__
    assert tuner("layer_norm", "--rehearse", "--seconds", "60", clock=seconds) == 0
    printed = capsys.readouterr().out
    assert printed.count("(today's)") == 1
    assert "0.99  out of time: RowTiles" in printed
    for function in ("norm_backward", "sum_partials"):
        assert f"out of time before {function} at 6x32" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "family: expected one of layer_norm"),
        (["layer_norm", "--size", "7x7", "--rehearse"], "--size: expected a part of one of"),
    ],
)
def test_command_line_errors(words, message, tuner, capsys):
    with pytest.raises(SystemExit):
        tuner(*words)
    assert message in capsys.readouterr().err
