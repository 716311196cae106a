"""Measures the vocabulary's projection and its smoothed loss: ours, which never holds the logits, and those that do.

TFLOP/s counts the matmuls: one forward, two more for the gradients of input and weight. On a GPU an entry also says the
memory at the peak.
"""

from __future__ import annotations

import pytest

from benchmarks.inputs import random, text
from benchmarks.measure import measure
from benchmarks.peers import LINEAR_CROSS_ENTROPY
from benchmarks.shapes import VOCABULARIES, Vocabulary
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops


def ours(x, weight, target, label_smoothing):
    return ops.linear_cross_entropy(x, weight, target, label_smoothing=label_smoothing)


def inputs(size: Vocabulary):
    weight = random(size.classes, size.columns, scale=size.columns**-0.5)
    return random(size.rows, size.columns), weight, text(size.rows, size.classes), size.label_smoothing


def work(size: Vocabulary, direction: str) -> Work:
    matmuls = 1 if direction == FORWARD else 3
    return Work(flops=matmuls * 2 * size.rows * size.columns * size.classes)


SUITE = Suite("linear_cross_entropy", VOCABULARIES, {OURS: Peer(ours), **LINEAR_CROSS_ENTROPY}, inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_cross_entropy(benchmark, case):
    measure(benchmark, case)
