"""dropout, residual, RMSNorm in one: ours against torch's operations one by one, and compiled by Inductor.

GB/s counts each tensor once: x, residual, y and h forward; dy, dh, h, dx and dresidual backward.
"""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.measure import measure_both, measure_forward, random
from benchmarks.shapes import NORMS, Rows
from tfm import ops

SIZES = NORMS[-1:]
DROPOUT_P, EPS = 0.1, 1e-6
FORWARD_TENSORS, BACKWARD_TENSORS = 4, 5


def ours(x, residual, weight):
    return ops.residual_rms_norm(x, residual, weight, EPS, DROPOUT_P)


def eager(x, residual, weight):
    h = residual + F.dropout(x, DROPOUT_P)
    return F.rms_norm(h, h.shape[-1:], weight, EPS), h


PEERS = {"ours": ours, "eager": eager, "compile": eager}


def inputs(size: Rows):
    return random(size.rows, size.columns), random(size.rows, size.columns), random(size.columns)


def test_rms_norm_forward(benchmark, function, size):
    tensors = inputs(size)
    measure_forward(benchmark, function, tensors, moved=FORWARD_TENSORS * tensors[0].nbytes)


def test_rms_norm_forward_and_backward(benchmark, function, size):
    tensors = inputs(size)
    measure_both(benchmark, function, tensors, moved=(FORWARD_TENSORS + BACKWARD_TENSORS) * tensors[0].nbytes)
