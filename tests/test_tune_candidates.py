"""What the tuner tries: questions worth a run, each of which can be put to an interpreter."""

from __future__ import annotations

import pytest
import torch

from benchmarks import device
from tfm import native
from tfm.ops import backends
from tools.tune.candidates import FAMILIES
from tools.tune.candidates.sweep import BackendSweep, LaunchSweep
from tools.tune.problems import listed, sweeps
from tools.tune.trials import Notes, try_all

pytestmark = pytest.mark.triton


def all_sweeps():
    return [sweep for family in FAMILIES.values() for sweep in family]


def test_questions_about_settings_are_worth_a_run():
    for sweep in all_sweeps():
        if isinstance(sweep, LaunchSweep):
            gives_up_the_kernel = any(row[0] is None for row in sweep.table)
            assert sweep.gain >= 0.02 - 1e-9 or gives_up_the_kernel, sweep.subject


def test_every_operation_of_csrc_on_gpus_is_put_beside_triton():
    natively = {
        name for row in backends.TABLE if row.backend == "native" and row.device == "cuda" for name in row.operations
    }
    asked = {sweep.subject for sweep in all_sweeps() if isinstance(sweep, BackendSweep)}
    # The same kernels without a residual, and those of the plain network by half, or with another matmul before them.
    assert natively - asked == {"layer_norm", "rms_norm", "gated_feed_forward", "linear_activation"}
    assert asked <= natively


class Two(Notes):
    """Lets today's choice and the candidate that promises most begin."""

    def is_known(self, place):
        return place > 2


def once(steps, mode):
    steps[0]()
    return [1.0]


MISSING = native.why_unavailable(device.DEVICE)
WITH_CSRC = [pytest.mark.skipif(bool(MISSING), reason=MISSING)]
# Sweeps of several sizes and tables are one question to an interpreter. csrc may be missing, as its own tests say.
ALIKE = {(type(sweep), sweep.subject, sweep.suite.inputs, sweep.settings, sweep.mode): sweep for sweep in all_sweeps()}
CASES = [
    pytest.param(
        sweep,
        marks=WITH_CSRC if isinstance(sweep, BackendSweep) else [],
        id=f"{sweep.subject} {sweep.suite.operation} {sweep.mode} {sweep.settings.__name__}",
    )
    for sweep in ALIKE.values()
]


@pytest.mark.parametrize("sweep", CASES)
def test_todays_choice_and_another_agree(sweep):
    found = try_all(sweep, sweep.rehearsal, torch.bfloat16, 1.0, float, Two(), once)
    assert not [trial.reason for trial in found if trial.reason]
    assert [trial.is_current for trial in found] == [True, False]


def test_the_list_is_of_numbers_largest_gain_first():
    order = [sweep.gain for _, sweep in sweeps("all")]
    assert order == sorted(order, reverse=True)
    assert len(order) == len(all_sweeps())
    text = "\n".join(listed(sweeps("all")))
    for sweep in all_sweeps():
        assert sweep.question in text
        assert any(digit in sweep.prediction for digit in "0123456789")
        assert all(isinstance(row[-1], float) for row in sweep.table)
