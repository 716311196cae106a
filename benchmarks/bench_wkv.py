"""RWKV-4's WKV beside transformers' own code, which goes through the steps in Python where it has no CUDA.

GB/s counts key, value and y once, and for the backward also dy, dkey and dvalue, and key and value once more.
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

# The width of RWKV at 169 million weights; a step of decoding. A GPU's run has no time left for them.
SIZES = sizes(
    gpu=[],
    cpu=[Channels(4, 256, 768), Channels(4, 1, 768)],
    rehearsal=[Channels(2, 5, 32)],
)


def ours(decay, first, key, value, state):
    return ops.wkv(decay, first, key, value, initial_state=state)


def transformers(decay, first, key, value, state):
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    return rwkv_linear_attention_cpu(decay, first, key, value, state=state.unbind())[0]


def inputs(size: Channels):
    weights = (random(size.channels).float().detach().requires_grad_() for _ in range(2))
    tokens = (random(size.batch, size.steps, size.channels) for _ in range(2))
    state = random(3, size.batch, size.channels).float().abs().detach()
    return *weights, *tokens, state


def work(size: Channels, direction: str) -> Work:
    moved = size.batch * size.steps * size.channels * DTYPE.itemsize
    return Work(bytes=3 * moved if direction == FORWARD else 8 * moved)


SUITE = Suite("wkv", SIZES, recurrent(ours, transformers), inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_wkv(benchmark, case):
    measure(benchmark, case)
