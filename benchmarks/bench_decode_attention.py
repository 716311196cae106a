"""Measures a step of decoding: one query a hypothesis attends to a cache, to which its latest key and value are added.

GB/s counts each key and value that some hypothesis attends to once, queries, outputs and our table of ancestors. The
peers' beams are put in order by copying the cache, of each layer at each step; ours by copying the table, once a step
for all layers, which is not counted.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.device import DEVICE, DTYPE
from benchmarks.inputs import random
from benchmarks.measure import measure
from benchmarks.peers import DECODE_ATTENTION
from benchmarks.shapes import DECODINGS, Decoding
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops

# A cache has room for more than it holds.
ROOM = 32


def ours(query, key_cache, value_cache, key, value, lengths, parents):
    return ops.decode_attention(query, key_cache, value_cache, lengths, parents, key=key, value=value)


def key_heads(size: Decoding) -> int:
    return size.key_heads or size.heads


def numbers(size: Decoding):
    """Makes query, caches [R, capacity, Hkv, D], key and value: the caches as the rows' own steps left them."""
    heads, capacity = key_heads(size), -(-size.length // ROOM) * ROOM
    caches = (random(size.rows, capacity, heads, size.head_dim).detach() for _ in range(2))
    latest = (random(size.rows, heads, size.head_dim).detach() for _ in range(2))
    return random(size.rows, size.heads, size.head_dim).detach(), *caches, *latest


def our_inputs(size: Decoding):
    query, *caches_and_latest = numbers(size)
    lengths = torch.full((size.rows,), size.length, dtype=torch.int32, device=DEVICE)
    parents = None
    if size.beam > 1:
        table, _ = size.ancestry()
        parents = torch.zeros(size.rows, caches_and_latest[0].shape[1], dtype=torch.int32, device=DEVICE)
        parents[:, : size.length] = table.to(DEVICE)
    return query, *caches_and_latest, lengths, parents


def inputs(size: Decoding):
    """Makes the same as the peers have it: rows in the order that they were in before this step."""
    query, *caches, key, value = numbers(size)
    if size.beam == 1:
        return query, *(cache.transpose(1, 2).contiguous() for cache in caches), key, value, size.length, None
    table, parent = (x.to(DEVICE) for x in size.ancestry())
    place = torch.arange(size.length, device=DEVICE)
    copied = []
    for cache in caches:
        before = torch.empty_like(cache)
        before[parent, : size.length] = cache[table.long(), place]
        copied.append(before.transpose(1, 2).contiguous())
    return query, *copied, key, value, size.length, parent


def work(size: Decoding, direction: str) -> Work:
    pairs, table = size.rows * size.length, 0
    if size.beam > 1:
        ancestors = size.ancestry()[0] + size.rows * torch.arange(size.length)
        pairs, table = len(ancestors.unique()), 4 * size.rows * size.length
    columns = 2 * pairs * key_heads(size) + 2 * size.rows * size.heads
    return Work(bytes=columns * size.head_dim * DTYPE.itemsize + table)


OURS_ALONE = {OURS: Peer(ours, inputs=our_inputs, where=lambda _, direction: direction == FORWARD)}
SUITE = Suite("decode_attention", DECODINGS, OURS_ALONE | DECODE_ATTENTION, inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_decode_attention(benchmark, case):
    measure(benchmark, case)
