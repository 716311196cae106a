"""Measures rotary position embedding of queries and keys, the first half of a head's columns paired with the second.

GB/s counts query and key read and written once, and their gradients once more.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.device import DEVICE, DTYPE
from benchmarks.inputs import heads
from benchmarks.measure import measure
from benchmarks.peers import ROTARY
from benchmarks.shapes import ROTARIES, Rotary
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops


def ours(query, key, cos, sin):
    return ops.rotary(query, key, cos, sin)


def query_and_key(size: Rotary):
    return tuple(heads(size.batch, size.length, size.heads, size.head_dim) for _ in range(2))


def our_inputs(size: Rotary):
    return *query_and_key(size), *ops.rotary_table(size.length, size.head_dim, device=DEVICE, dtype=DTYPE)


def inputs(size: Rotary):
    """Makes the inputs of Hugging Face's models: tables [1, S, D] of two equal halves."""
    tables = ops.rotary_table(size.length, size.head_dim, device=DEVICE, dtype=DTYPE)
    return *query_and_key(size), *(torch.cat((table, table), dim=-1)[None] for table in tables)


def work(size: Rotary, direction: str) -> Work:
    moved = 4 * size.batch * size.length * size.heads * size.head_dim * DTYPE.itemsize
    return Work(bytes=moved if direction == FORWARD else 2 * moved)


SUITE = Suite("rotary", ROTARIES, {OURS: Peer(ours, inputs=our_inputs), **ROTARY}, inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_rotary(benchmark, case):
    measure(benchmark, case)
