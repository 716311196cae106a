"""Measures the vocabulary's projection and its smoothed loss: ours, which never holds the logits, and those that do.

TFLOP/s counts the matmuls: one forward, two more for the gradients of input and weight. On a GPU an entry also says the
memory at the peak. Of logits that are there the loss alone: GB/s counts them once, and their gradient once.
"""

from __future__ import annotations

import pytest

from benchmarks.device import DTYPE
from benchmarks.inputs import random, text
from benchmarks.measure import measure
from benchmarks.peers import CROSS_ENTROPY, LINEAR_CROSS_ENTROPY
from benchmarks.shapes import VOCABULARIES, Vocabulary, sizes
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


def ours_of_logits(logits, target, label_smoothing):
    return ops.cross_entropy(logits, target, label_smoothing=label_smoothing)


def logits_inputs(size: Vocabulary):
    return random(size.rows, size.classes), text(size.rows, size.classes), size.label_smoothing


def logits_work(size: Vocabulary, direction: str) -> Work:
    return Work(bytes=(1 if direction == FORWARD else 2) * size.rows * size.classes * DTYPE.itemsize)


# A GPU's run has no time left for them.
KEPT = sizes(gpu=[], cpu=VOCABULARIES, rehearsal=VOCABULARIES)
OF_LOGITS = Suite(
    "cross_entropy", KEPT, {OURS: Peer(ours_of_logits), **CROSS_ENTROPY}, logits_inputs, logits_work
)  # fmt: skip


@pytest.mark.parametrize("case", SUITE.cases() + OF_LOGITS.cases(), ids=str)
def test_cross_entropy(benchmark, case):
    measure(benchmark, case)
