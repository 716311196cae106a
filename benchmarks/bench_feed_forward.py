"""The feed-forward network with dropout inside: ours against torch's operations one by one, and compiled by Inductor.

GFLOP/s counts the matmuls: two forward, four more backward.
"""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.measure import measure_both, measure_forward, random
from benchmarks.shapes import FEED_FORWARDS, Projection
from tfm import ops

SIZES = FEED_FORWARDS
DROPOUT_P = 0.1


def ours(x, w1, b1, w2, b2):
    return ops.feed_forward(x, w1, b1, w2, b2, "relu", DROPOUT_P)


def eager(x, w1, b1, w2, b2):
    return F.linear(F.dropout(F.relu(F.linear(x, w1, b1)), DROPOUT_P), w2, b2)


PEERS = {"ours": ours, "eager": eager, "compile": eager}


def inputs(size: Projection):
    w1 = random(size.outputs, size.columns, scale=size.columns**-0.5)
    w2 = random(size.columns, size.outputs, scale=size.outputs**-0.5)
    return random(size.rows, size.columns), w1, random(size.outputs), w2, random(size.columns)


def matmul_flops(size: Projection) -> int:
    return 2 * size.rows * size.columns * size.outputs


def test_feed_forward_forward(benchmark, function, size):
    measure_forward(benchmark, function, inputs(size), flops=2 * matmul_flops(size))


def test_feed_forward_forward_and_backward(benchmark, function, size):
    measure_both(benchmark, function, inputs(size), flops=6 * matmul_flops(size))
