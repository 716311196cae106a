"""The vocabulary's projection and its smoothed loss: ours, which never holds the logits, against those who do.

GFLOP/s counts the matmuls: one forward, two more for the gradients of input and weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.measure import DEVICE, measure_both, measure_forward, random
from benchmarks.shapes import VOCABULARIES, Projection
from tfm import ops

SIZES = VOCABULARIES
LABEL_SMOOTHING = 0.1


def ours(x, weight, target):
    return ops.linear_cross_entropy(x, weight, target, label_smoothing=LABEL_SMOOTHING)


def eager(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target, label_smoothing=LABEL_SMOOTHING)


PEERS = {"ours": ours, "eager": eager, "compile": eager}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and newer

    def torchs(x, weight, target):
        return F.linear_cross_entropy(x, weight, target, label_smoothing=LABEL_SMOOTHING)

    PEERS["torch's fused"] = torchs


def inputs(size: Projection):
    target = torch.randint(size.outputs, (size.rows,), device=DEVICE)
    return random(size.rows, size.columns), random(size.outputs, size.columns, scale=size.columns**-0.5), target


def matmul_flops(size: Projection) -> int:
    return 2 * size.rows * size.columns * size.outputs


def test_linear_cross_entropy_forward(benchmark, function, size):
    measure_forward(benchmark, function, inputs(size), flops=matmul_flops(size))


def test_linear_cross_entropy_forward_and_backward(benchmark, function, size):
    measure_both(benchmark, function, inputs(size), flops=3 * matmul_flops(size))
