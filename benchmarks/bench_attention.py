"""Attention of padded batches, long sequences, and T5's bias that learns.

TFLOP/s counts the two products over the keys that each query may attend to; backward counts as two and a half times
forward. GB/s counts query, key, value and output once forward, and twice more with their gradients; both without
padding.
"""

from __future__ import annotations

import pytest

from benchmarks.device import DTYPE
from benchmarks.inputs import heads, integers, padding_mask, random
from benchmarks.measure import measure
from benchmarks.peers import SDPA, block_mask, flex_peer, ours_natively
from benchmarks.shapes import SEQUENCES, Sequences
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops


def ours(query, key, value, bias, lengths, is_causal):
    return ops.attention(query, key, value, bias, is_causal=is_causal, key_lengths=lengths)


def qkv(size: Sequences):
    return tuple(heads(size.batch, size.length, size.heads, size.head_dim) for _ in range(3))


def learnt(size: Sequences):
    """The bias, or None."""
    return random(1, size.heads, size.length, size.length) if size.mask == "bias" else None


def our_inputs(size: Sequences):
    lengths = integers(size.lengths) if size.mask == "lengths" else None
    return *qkv(size), learnt(size), lengths, size.mask == "causal"


def sdpa_inputs(size: Sequences):
    tensors = qkv(size)
    mask = padding_mask(integers(size.lengths), size.length) if size.mask == "lengths" else learnt(size)
    return *tensors, mask, size.mask == "causal"


def flex_inputs(size: Sequences):
    lengths = integers(size.lengths) if size.mask == "lengths" else None
    return *qkv(size), learnt(size), block_mask(lengths, size.mask == "causal", size.length, size.length)


def work(size: Sequences, direction: str) -> Work:
    pairs = size.length * sum(size.lengths) / (2 if size.mask == "causal" else 1)
    flops = 4 * pairs * size.heads * size.head_dim
    moved = 4 * sum(size.lengths) * size.heads * size.head_dim * DTYPE.itemsize
    return Work(moved, round(flops)) if direction == FORWARD else Work(3 * moved, round(3.5 * flops))


def is_short(size: Sequences, direction: str) -> bool:
    """Whether csrc's kernels for GPUs serve it: few keys, no bias that learns."""
    return size.length <= 256 and size.mask != "bias"


OUR = Peer(ours, inputs=our_inputs)
PEERS = {OURS: OUR} | ours_natively(OUR, is_short) | SDPA | flex_peer(flex_inputs)
SUITE = Suite("attention", SEQUENCES, PEERS, sdpa_inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_attention(benchmark, case):
    measure(benchmark, case)
