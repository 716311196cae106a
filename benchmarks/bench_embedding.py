"""Measures token rows, scaled, with sinusoidal positions and dropout.

The peers read the sinusoid from a table, as everybody does. GB/s counts a row read and a row written for each token
forward; backward the row's gradient read, and the weight's written whole.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.device import DEVICE, DTYPE
from benchmarks.inputs import random, text
from benchmarks.measure import measure
from benchmarks.peers import EMBEDDING
from benchmarks.shapes import EMBEDDINGS, Embedding
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops

LONGEST = 64


def ours(tokens, weight, positions, table, dropout_p):
    return ops.embedding(tokens, weight, positions, scale=weight.shape[1] ** 0.5, dropout_p=dropout_p)


def inputs(size: Embedding):
    positions = torch.arange(size.rows, device=DEVICE) % LONGEST
    table = ops.sinusoid(torch.arange(LONGEST, device=DEVICE), size.columns, torch.float64).to(DTYPE)
    weight = random(size.vocabulary, size.columns)
    return text(size.rows, size.vocabulary), weight, positions, table, size.dropout_p


def work(size: Embedding, direction: str) -> Work:
    rows = 2 * size.rows if direction == FORWARD else 3 * size.rows + size.vocabulary
    return Work(bytes=rows * size.columns * DTYPE.itemsize)


SUITE = Suite("embedding", EMBEDDINGS, {OURS: Peer(ours), **EMBEDDING}, inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_embedding(benchmark, case):
    measure(benchmark, case)
