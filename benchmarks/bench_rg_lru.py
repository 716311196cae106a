"""RecurrentGemma's RG-LRU, from the gates' products on, beside transformers' own lines for it.

GB/s counts x, both gates and y once, and for the backward also dy and the three gradients, and what was read once more.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.device import DTYPE
from benchmarks.inputs import random
from benchmarks.measure import measure
from benchmarks.peers import recurrent
from benchmarks.shapes import Channels, sizes
from benchmarks.suite import FORWARD, Suite, Work
from tfm import ops

# The width of RecurrentGemma at 2 billion weights; a step of decoding. A GPU's run has no time left for them.
SIZES = sizes(
    gpu=[],
    cpu=[Channels(2, 128, 2560), Channels(2, 1, 2560)],
    rehearsal=[Channels(2, 5, 32)],
)


def ours(x, input_gate, recurrence_gate, param, reset, state):
    return ops.rg_lru(x, input_gate, recurrence_gate, param, reset=reset, initial_state=state)


def transformers(x, input_gate, recurrence_gate, param, reset, state):
    """The lines of RecurrentGemmaRglru.forward behind its products."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru, SqrtBoundDerivative

    reset = reset[:, :, None]
    log_gate = -8.0 * torch.sigmoid(recurrence_gate) * F.softplus(param)
    gate, square = torch.exp(log_gate), torch.exp(2 * log_gate)
    multiplier = reset + ~reset * SqrtBoundDerivative.apply(1 - square)
    inputs = x * torch.sigmoid(input_gate) * multiplier.type(x.dtype)
    return RecurrentGemmaRglru._rnn_scan(None, inputs, gate, reset, state)[0]  # type: ignore[arg-type]


def inputs(size: Channels):
    tokens = [random(size.batch, size.steps, size.channels) for _ in range(3)]
    reset = torch.zeros(size.batch, size.steps, dtype=torch.bool, device=tokens[0].device)
    reset[:, 0] = size.steps > 1
    state = torch.zeros(size.batch, size.channels, device=reset.device)
    return *tokens, random(size.channels), reset, state


def work(size: Channels, direction: str) -> Work:
    moved = size.batch * size.steps * size.channels * DTYPE.itemsize
    return Work(bytes=4 * moved if direction == FORWARD else 11 * moved)


SUITE = Suite("rg_lru", SIZES, recurrent(ours, transformers), inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_rg_lru(benchmark, case):
    measure(benchmark, case)
