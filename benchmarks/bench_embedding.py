"""Token rows, scaled, with sinusoidal positions and dropout: ours against torch's operations one by one, and compiled.

The peers read the sinusoid from a table, as everybody does. GB/s counts a row read and a row written for each token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.measure import DEVICE, DTYPE, measure_both, measure_forward, random
from benchmarks.shapes import EMBEDDINGS, Rows
from tfm import ops

SIZES = EMBEDDINGS
VOCABULARY, LONGEST, DROPOUT_P = 10_000, 64, 0.1


def ours(tokens, weight, positions, table):
    return ops.embedding(tokens, weight, positions, scale=weight.shape[1] ** 0.5, dropout_p=DROPOUT_P)


def eager(tokens, weight, positions, table):
    return F.dropout(F.embedding(tokens, weight) * weight.shape[1] ** 0.5 + table[positions], DROPOUT_P)


PEERS = {"ours": ours, "eager": eager, "compile": eager}


def inputs(size: Rows):
    tokens = torch.randint(VOCABULARY, (size.rows,), device=DEVICE)
    positions = torch.arange(size.rows, device=DEVICE) % LONGEST
    table = ops.sinusoid(torch.arange(LONGEST, device=DEVICE), size.columns).to(DTYPE)
    return tokens, random(VOCABULARY, size.columns), positions, table


def test_embedding_forward(benchmark, function, size):
    tensors = inputs(size)
    measure_forward(benchmark, function, tensors, moved=2 * size.rows * size.columns * DTYPE.itemsize)


def test_embedding_forward_and_backward(benchmark, function, size):
    tensors = inputs(size)
    measure_both(benchmark, function, tensors, moved=4 * size.rows * size.columns * DTYPE.itemsize)
