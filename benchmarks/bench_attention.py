"""Measures attention of padded batches, of long sequences, with T5's bias that learns, and of sentences packed.

TFLOP/s counts the two products over the keys that each query may attend to; backward counts as two and a half times
forward. GB/s counts query, key, value and output once forward, and twice more with their gradients; both without
padding.

Sentences packed end to end stand beside SDPA on the padded batch, and torch's own packed attention. Causal peers take
no mask of the padding: it ends each sentence, so that causality hides it from every token.
"""

from __future__ import annotations

import pytest

from benchmarks.device import DTYPE
from benchmarks.inputs import heads, integers, padding_mask, random
from benchmarks.measure import measure
from benchmarks.peers import SDPA, block_mask, flex_peer, ours_natively, torch_varlen
from benchmarks.shapes import SENTENCES, SEQUENCES, Sentences, Sequences
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops
from tfm.sequences import offsets


def ours(query, key, value, bias, lengths, is_causal):
    return ops.attention(query, key, value, bias, is_causal=is_causal, key_lengths=lengths)


def ours_packed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal):
    return ops.varlen_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=is_causal)


def ours_padded(query, key, value, lengths, is_causal):
    return ops.attention(query, key, value, key_lengths=lengths, is_causal=is_causal)


def qkv(size: Sequences):
    return tuple(heads(size.batch, size.length, size.heads, size.head_dim) for _ in range(3))


def learnt(size: Sequences):
    """Returns the bias, or None."""
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


def packed_inputs(size: Sentences):
    lengths = size.queries, size.keys, size.keys
    query, key, value = (random(sum(side), size.heads, size.head_dim) for side in lengths)
    cu_seq_q, cu_seq_k = offsets(integers(size.queries)), offsets(integers(size.keys))
    return query, key, value, cu_seq_q, cu_seq_k, max(size.queries), max(size.keys), size.mask == "causal"


def padded_qkv(size: Sentences):
    longest = max(size.queries), max(size.keys), max(size.keys)
    return tuple(heads(size.sentences, length, size.heads, size.head_dim) for length in longest)


def padded_inputs(size: Sentences):
    return *padded_qkv(size), integers(size.keys), size.mask == "causal"


def padded_sdpa_inputs(size: Sentences):
    is_causal = size.mask == "causal"
    return *padded_qkv(size), None if is_causal else padding_mask(integers(size.keys), max(size.keys)), is_causal


def padded_flex_inputs(size: Sentences):
    is_causal = size.mask == "causal"
    lengths = None if is_causal else integers(size.keys)
    return *padded_qkv(size), None, block_mask(lengths, is_causal, max(size.queries), max(size.keys))


def work_of(tokens: int, pairs: float, size: Sequences | Sentences, direction: str) -> Work:
    """Counts `pairs` of query and key, and `tokens` of query, key, value and output together."""
    flops = 4 * pairs * size.heads * size.head_dim
    moved = tokens * size.heads * size.head_dim * DTYPE.itemsize
    return Work(moved, round(flops)) if direction == FORWARD else Work(3 * moved, round(3.5 * flops))


def work(size: Sequences, direction: str) -> Work:
    pairs = size.length * sum(size.lengths) / (2 if size.mask == "causal" else 1)
    return work_of(4 * sum(size.lengths), pairs, size, direction)


def packed_work(size: Sentences, direction: str) -> Work:
    queries, keys = size.queries, size.keys
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True)) / (2 if size.mask == "causal" else 1)
    return work_of(2 * (sum(queries) + sum(keys)), pairs, size, direction)


def is_short(size: Sequences, direction: str) -> bool:
    """Says whether csrc's kernels for GPUs serve the size: few keys, no bias that learns."""
    return size.length <= 256 and size.mask != "bias"


OUR = Peer(ours, inputs=our_inputs)
PEERS = {OURS: OUR} | ours_natively(OUR, is_short) | SDPA | flex_peer(flex_inputs)
PADDED = Suite("attention", SEQUENCES, PEERS, sdpa_inputs, work)

OUR_PACKED = Peer(ours_packed, inputs=packed_inputs)
PACKED_PEERS = {f"{OURS}, padded": Peer(ours_padded, inputs=padded_inputs), OURS: OUR_PACKED}
PACKED_PEERS |= ours_natively(OUR_PACKED) | SDPA
PACKED_PEERS |= {"torch varlen": Peer(torch_varlen, inputs=packed_inputs, gpu=True)} | flex_peer(padded_flex_inputs)
PACKED = Suite("attention", SENTENCES, PACKED_PEERS, padded_sdpa_inputs, packed_work)


@pytest.mark.parametrize("case", PADDED.cases(), ids=str)
def test_attention(benchmark, case):
    measure(benchmark, case)


@pytest.mark.parametrize("case", PACKED.cases(), ids=str)
def test_varlen_attention(benchmark, case):
    measure(benchmark, case)
