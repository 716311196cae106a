"""dropout, residual, LayerNorm in one: ours against torch's operations one by one, and compiled by Inductor.

On a GPU ours is the Triton kernel in bf16, on a CPU the reference in fp32. GB/s counts each tensor once, as a perfect
kernel would move it: x, residual, y and h forward; dy, dh, h, dx and dresidual backward.
"""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.measure import measure_both, measure_forward, random
from benchmarks.shapes import NORMS, Rows
from tfm import ops

SIZES = NORMS
DROPOUT_P = 0.1
FORWARD_TENSORS, BACKWARD_TENSORS = 4, 5


def ours(x, residual, weight, bias):
    return ops.residual_layer_norm(x, residual, weight, bias, dropout_p=DROPOUT_P)


def eager(x, residual, weight, bias):
    h = residual + F.dropout(x, DROPOUT_P)
    return F.layer_norm(h, h.shape[-1:], weight, bias), h


PEERS = {"ours": ours, "eager": eager, "compile": eager}


def inputs(size: Rows):
    shape = (size.rows, size.columns)
    return random(*shape), random(*shape), random(size.columns), random(size.columns)


def test_layer_norm_forward(benchmark, function, size):
    tensors = inputs(size)
    measure_forward(benchmark, function, tensors, moved=FORWARD_TENSORS * tensors[0].nbytes)


def test_layer_norm_forward_and_backward(benchmark, function, size):
    tensors = inputs(size)
    measure_both(benchmark, function, tensors, moved=(FORWARD_TENSORS + BACKWARD_TENSORS) * tensors[0].nbytes)
