"""Mamba's short convolution: four taps and SiLU over channels that lie side by side, as its projection leaves them.

GB/s counts x and y once, and for the backward x, dy and dx once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch.nn.functional as F

from benchmarks.device import DTYPE
from benchmarks.inputs import random
from benchmarks.measure import measure
from benchmarks.shapes import sizes
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops

TAPS = 4


@dataclass(frozen=True)
class Channels:
    """Sequences, their steps, and channels."""

    batch: int
    steps: int
    channels: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.steps}x{self.channels}"


# The width of Mamba at 370 million weights.
SIZES = sizes(
    gpu=[Channels(8, 2048, 2048)],
    cpu=[Channels(4, 256, 512)],
    rehearsal=[Channels(2, 5, 32)],
)


def ours(x, weight, bias):
    return ops.causal_conv1d(x, weight, bias, activation="silu")


def in_torch(x, weight, bias):
    y = F.conv1d(x, weight[:, None], bias, padding=TAPS - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[-1]])


def inputs(size: Channels):
    x = random(size.batch, size.steps, size.channels).detach().transpose(1, 2).requires_grad_()
    return x, random(size.channels, TAPS, scale=0.5), random(size.channels)


def work(size: Channels, direction: str) -> Work:
    moved = size.batch * size.steps * size.channels * DTYPE.itemsize
    return Work(bytes=2 * moved if direction == FORWARD else 5 * moved)


# Only the forward is compiled: a GPU's run has no time for more.
COMPILED = Peer(in_torch, compiled="default", where=lambda size, direction: direction == FORWARD)
PEERS = {OURS: Peer(ours), "eager": Peer(in_torch), "compile": COMPILED}
SUITE = Suite("causal_conv1d", SIZES, PEERS, inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_causal_conv1d(benchmark, case):
    measure(benchmark, case)
