"""Measures the feed-forward networks, plain with ReLU and gated with SiLU (SwiGLU), with dropout inside.

TFLOP/s counts the matmuls: two forward, or three in the gated network, and twice as many backward.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from benchmarks.inputs import random
from benchmarks.measure import measure
from benchmarks.peers import FEED_FORWARD, GATED_FEED_FORWARD, ours_natively
from benchmarks.shapes import FEED_FORWARDS, GATED_FEED_FORWARDS, FeedForward
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops


def ours(x, w1, b1, w2, b2, dropout_p):
    return ops.feed_forward(x, w1, b1, w2, b2, "relu", dropout_p)


def ours_gated(x, gate, up, down, dropout_p):
    return ops.gated_feed_forward(x, gate, up, down, "silu", dropout_p)


def weight(rows: int, columns: int) -> Tensor:
    return random(rows, columns, scale=columns**-0.5)


def inputs(size: FeedForward):
    w1, w2 = weight(size.inner, size.columns), weight(size.columns, size.inner)
    return random(size.rows, size.columns), w1, random(size.inner), w2, random(size.columns), size.dropout_p


def gated_inputs(size: FeedForward):
    gate, up = weight(size.inner, size.columns), weight(size.inner, size.columns)
    return random(size.rows, size.columns), gate, up, weight(size.columns, size.inner), size.dropout_p


def matmuls(size: FeedForward, count: int) -> Work:
    return Work(flops=count * 2 * size.rows * size.columns * size.inner)


def work(size: FeedForward, direction: str) -> Work:
    return matmuls(size, 2 if direction == FORWARD else 6)


def gated_work(size: FeedForward, direction: str) -> Work:
    return matmuls(size, 3 if direction == FORWARD else 9)


PEERS = {OURS: Peer(ours)} | ours_natively(Peer(ours)) | FEED_FORWARD
GATED_PEERS = {OURS: Peer(ours_gated)} | ours_natively(Peer(ours_gated)) | GATED_FEED_FORWARD
PLAIN = Suite("feed_forward", FEED_FORWARDS, PEERS, inputs, work)
GATED = Suite("feed_forward", GATED_FEED_FORWARDS, GATED_PEERS, gated_inputs, gated_work)


@pytest.mark.parametrize("case", PLAIN.cases(), ids=str)
def test_feed_forward(benchmark, case):
    measure(benchmark, case)


@pytest.mark.parametrize("case", GATED.cases(), ids=str)
def test_gated_feed_forward(benchmark, case):
    measure(benchmark, case)
