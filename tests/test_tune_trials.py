"""A candidate is checked before it is timed, what fails is said, and the verdict is on numbers."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from tune_cases import SUITE, SWEEP, TODAYS, Doubled

from benchmarks.suite import OURS, Peer
from tfm.kernels.launch import rows
from tools.tune.findings import Finding, summary
from tools.tune.problems import Task
from tools.tune.trials import Notes, Trial, best_of, timed, try_all

pytestmark = pytest.mark.triton


def seconds(steps, mode):
    """Time grows with the warps in place."""
    for step in steps:
        step()
    warps = rows.sum_partials(32).num_warps
    return [warps * 1e-6, 1.1 * warps * 1e-6, 0.9 * warps * 1e-6]


def trials_of(until=float("inf"), **changes):
    clock = itertools.count().__next__
    return try_all(replace(SWEEP, **changes), 3, torch.float32, until, clock, Notes(), seconds)


def with_warps(count):
    return str(replace(TODAYS, num_warps=count))


def test_a_wrong_or_failing_candidate_is_said_and_not_timed():
    tried = trials_of()
    assert [trial.settings for trial in tried] == [str(TODAYS), *map(with_warps, (16, 4, 32, 2))]
    assert [trial.is_current for trial in tried] == [True, False, False, False, False]
    assert [trial.expected for trial in tried] == [1.0, 0.6, 0.7, 0.8, 0.9]
    assert [bool(trial.samples) for trial in tried] == [True, False, True, False, True]
    assert re.match(r"ValueError: result 1 errs by 5.0e-02, expected at most 1.2e-07", tried[1].reason)
    assert tried[3].reason == "RuntimeError: out of resource: registers"
    assert best_of(tried) == tried[4]
    assert rows.sum_partials(32) == TODAYS


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
    def inputs(size):
        raise MemoryError("out of memory")

    (trial,) = trials_of(suite=replace(SUITE, inputs=inputs))
    assert trial.reason == "MemoryError: out of memory"
    (trial,) = trials_of(subject="norm.forward")
    assert trial.reason == "is not called at this size"


def test_one_call_of_several_is_replaced():
    def twice(x):
        return Doubled.apply(x), rows.sum_partials(64).num_warps * Doubled.apply(x)

    tried = trials_of(suite=replace(SUITE, peers={OURS: Peer(twice)}), table=((4, 0.5),))
    assert [trial.call for trial in tried] == ["rows.sum_partials(columns=32)"] * 2 + [
        "rows.sum_partials(columns=64)"
    ] * 2
    # The second call's settings are a factor of the result, so that others than today's make it wrong.
    assert [bool(trial.samples) for trial in tried] == [True, True, True, False]


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_a_step_counts_once_in_either_mode(mode, monkeypatch):
    # The clock goes by the calls: a step is a second.
    done = []
    monkeypatch.setattr("benchmarks.device.clock", lambda: float(len(done)))
    monkeypatch.setattr("benchmarks.device.capture", lambda steps: lambda: [step() for step in steps])
    assert set(timed([lambda: done.append(0)] * 3, mode)) == {1.0}


def finding(*shares, expected=(1.0, 0.9, 0.95), spread=0.01, reason=""):
    """Of today's and two candidates; a share of 0 failed."""
    trials = [
        Trial(
            "f()", f"Settings({k})", expected[k], k == 0,
            (share * (1 - spread / 2), share, share * (1 + spread / 2)) if share else (), "" if share else reason,
        )
        for k, share in enumerate(shares)
    ]  # fmt: skip
    return Finding(Task("double", SWEEP, 3, torch.float32), trials)


@pytest.mark.parametrize(
    ("found", "held"),
    [
        (finding(1.0, 0.89, 1.0), True),
        (finding(1.0, 0.95, 0.97), False),
        (finding(1.0, 0.95, 0.97, spread=0.06), True),
        # Another candidate than the one expected may be the one as fast.
        (finding(1.0, 1.2, 0.9), True),
        (finding(1.0, 0.0, 1.1), False),
        (finding(1.0, 1.1, 1.2, expected=(1.0, 1.1, 1.2)), True),
    ],
)
def test_a_prediction_holds_within_the_spread_of_what_was_measured(found, held):
    (verdict,) = found.verdicts()
    assert verdict.held == held


def test_nothing_is_judged_that_was_not_measured():
    assert not list(finding(0.0, 0.9, 1.0, reason="failed").verdicts())
    assert not list(finding(1.0, 0.0, 0.0, reason="out of time").verdicts())
    assert not list(finding().verdicts())


def test_the_summary_fits_what_can_be_seen_and_counts_the_rest():
    found = [finding(1.0, 0.5 + k / 1000, 0.0, reason=f"failed {k}") for k in range(300)]
    text = "\n".join(summary([*found, *[finding()] * 300]))
    assert len(text) <= 12000
    # What gains most comes first; what was left out is counted.
    assert text.index("50.0% less") < text.index("49.9% less")
    assert len(re.findall(r"and \d+ more, in the record", text)) == 4
    assert "Predictions that missed, 300 of 300" in text


def test_the_summary_names_settings_to_paste_and_what_had_no_turn():
    text = "\n".join(summary([finding(1.0, 0.9, 0.0, reason="out of time"), finding()]))
    assert "10.0% less, 900000.0 µs: rows.sum_partials forward and backward at 3\n    f()\n    Settings(1)" in text
    assert "Not tried for want of time:\n  rows.sum_partials forward and backward at 3 (1 candidates)" in text
    assert "Failed: none" in text
