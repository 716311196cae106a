"""Mamba's selective scan beside transformers' own code, which goes through the steps in Python.

GB/s counts x, delta, z and y once, and for the backward also dy, dx, ddelta and dz, and x, delta and z once more; what
a step has for all channels, and the states that are kept, are left out.
"""

from __future__ import annotations

import pytest

from benchmarks.device import DTYPE
from benchmarks.inputs import random
from benchmarks.measure import measure
from benchmarks.peers import recurrent
from benchmarks.shapes import Channels, sizes
from benchmarks.suite import FORWARD, Suite, Work
from tfm import ops

# The width of Mamba at 130 million weights; a step of decoding. A GPU's run has no time left for them.
SIZES = sizes(
    gpu=[],
    cpu=[Channels(4, 64, 1536, 16), Channels(4, 1, 1536, 16)],
    rehearsal=[Channels(2, 5, 32, 4)],
)


def ours(x, delta, A, B, C, D, z, delta_bias):
    return ops.selective_scan(x, delta, A, B, C, D=D, z=z, delta_bias=delta_bias)


def transformers(x, delta, A, B, C, D, z, delta_bias):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, delta, B, C, z = (given.transpose(1, 2) for given in (x, delta, B, C, z))
    y = mamba_selective_scan(x, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True)
    return y.transpose(1, 2)


def inputs(size: Channels):
    tokens = [random(size.batch, size.steps, size.channels) for _ in range(3)]
    A = -random(size.channels, size.states).float().exp()
    B, C = (random(size.batch, size.steps, size.states) for _ in range(2))
    D, bias = (random(size.channels).float().detach().requires_grad_() for _ in range(2))
    return tokens[0], tokens[1], A.detach().requires_grad_(), B, C, D, tokens[2], bias


def work(size: Channels, direction: str) -> Work:
    moved = size.batch * size.steps * size.channels * DTYPE.itemsize
    return Work(bytes=4 * moved if direction == FORWARD else 11 * moved)


SUITE = Suite("selective_scan", SIZES, recurrent(ours, transformers), inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_selective_scan(benchmark, case):
    measure(benchmark, case)
