"""A step that is captured once for each shape of batch trains as one that is run; on a GPU the graphs are CUDA's."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import BATCHES, assert_same_weights, resumed_in, training_in

import tfm
from tfm.graphs import GraphedSteps
from tfm.operators import cross_entropy


def rounds_on_any_device(training):
    """Prepares batches as on a GPU."""
    training._prepared = lambda batch: batch.rounded(64, 8, 16)
    return training


class Captures:
    """Stands in for CUDA graphs: what is captured is not run, and replays read the tensors that it was given."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, step):
        self.captured += 1

        def replay():
            self.replayed += 1
            step()

        return None, replay


def test_replayed_steps_train_as_run_ones(tmp_path):
    run, replayed = (rounds_on_any_device(training_in(tmp_path / name)) for name in ("run", "replayed"))
    replayed.steps.capture = captures = Captures()
    shapes = {replayed._prepared(batch).shape for batch in replayed._plan()}
    for training in (run, replayed):
        torch.manual_seed(5)
        training.train(max_steps=3 * BATCHES)
    assert_same_weights(run, replayed)
    assert 0 < captures.captured <= len(shapes) < BATCHES
    # All but the first of each shape.
    assert captures.replayed >= 3 * BATCHES - len(shapes)
    assert len(replayed.steps.recordings.met) + captures.replayed == 3 * BATCHES


def test_beyond_the_most_graphs_steps_are_run(monkeypatch):
    monkeypatch.setattr("tfm.graphs.MOST_GRAPHS", 1)
    steps = GraphedSteps(seen := [], torch.device("cpu"), captures := Captures())
    steps.step = lambda batch: seen.append(batch.number)
    for number, shape in enumerate("abbbaabcc"):
        steps(Numbered(number, shape))
    assert seen == list(range(9))
    assert (captures.captured, captures.replayed) == (1, 3)


class Numbered:
    """What GraphedSteps asks of a batch."""

    def __init__(self, number, shape):
        self.number, self.shape = number, shape

    def to(self, device, non_blocking=False):
        return self

    def clone(self):
        return Numbered(self.number, self.shape)

    def copy_(self, other):
        self.number = other.number


class ReadsNothing(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: a capture would fail there."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        assert not name.startswith(self.WAITS), f"the step waits for {function.name()}"
        return function(*args, **(kwargs or {}))


@pytest.mark.triton
def test_a_step_reads_nothing_back(tmp_path, monkeypatch):
    # What is read where reading costs nothing: on CPUs.
    monkeypatch.setattr(sys.modules["tfm.ops.cross_entropy"], "_check_range", lambda *_: None)
    monkeypatch.setattr(cross_entropy, "_is_one", lambda factor: False)
    training = rounds_on_any_device(training_in(tmp_path))
    batch = training._prepared(training._plan()[0])
    with tfm.use("triton"):
        training._step(batch)
        with ReadsNothing():
            training._step(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graphs_train_as_run_kernels(dtype, tmp_path):
    trainings = [
        training_in(tmp_path / str(graphs), device="cuda", dtype=dtype, graphs=graphs) for graphs in (False, True)
    ]
    for training in trainings:
        torch.manual_seed(5)
        training.train(max_steps=3 * BATCHES)
    assert_same_weights(*trainings)
    assert not trainings[0].steps.recordings.kept
    assert trainings[1].steps.recordings.kept


@pytest.mark.gpu
def test_a_resumed_run_captures_again_and_is_the_uninterrupted_one(tmp_path):
    whole = training_in(tmp_path / "whole", device="cuda")
    whole.train(max_steps=3 * BATCHES)
    # Seeds torch anew.
    training_in(tmp_path / "parts", device="cuda").train(max_steps=2 * BATCHES)
    parts = resumed_in(tmp_path / "parts", device="cuda")
    parts.train(max_steps=3 * BATCHES)
    assert_same_weights(parts, whole)
