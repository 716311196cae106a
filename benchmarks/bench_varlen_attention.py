"""Attention of batches of sentences: ours packed end to end, against SDPA on the padded batch, and torch's own packed.

TFLOP/s and GB/s count as in bench_attention.py. Causal peers take no mask of the padding: it ends each sentence, so
that causality hides it from every token.
"""

from __future__ import annotations

import pytest

from benchmarks.device import DTYPE
from benchmarks.inputs import heads, integers, padding_mask, random
from benchmarks.measure import measure
from benchmarks.peers import SDPA, block_mask, flex_peer, ours_natively, torch_varlen
from benchmarks.shapes import SENTENCES, Sentences
from benchmarks.suite import FORWARD, OURS, Peer, Suite, Work
from tfm import ops
from tfm.sequences import offsets


def ours(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal):
    return ops.varlen_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=is_causal)


def packed_inputs(size: Sentences):
    lengths = size.queries, size.keys, size.keys
    query, key, value = (random(sum(side), size.heads, size.head_dim) for side in lengths)
    cu_seq_q, cu_seq_k = offsets(integers(size.queries)), offsets(integers(size.keys))
    return query, key, value, cu_seq_q, cu_seq_k, max(size.queries), max(size.keys), size.mask == "causal"


def padded(query, key, value, lengths, is_causal):
    return ops.attention(query, key, value, key_lengths=lengths, is_causal=is_causal)


def qkv(size: Sentences):
    longest = max(size.queries), max(size.keys), max(size.keys)
    return tuple(heads(size.sentences, length, size.heads, size.head_dim) for length in longest)


def padded_inputs(size: Sentences):
    return *qkv(size), integers(size.keys), size.mask == "causal"


def sdpa_inputs(size: Sentences):
    is_causal = size.mask == "causal"
    return *qkv(size), None if is_causal else padding_mask(integers(size.keys), max(size.keys)), is_causal


def flex_inputs(size: Sentences):
    is_causal = size.mask == "causal"
    lengths = None if is_causal else integers(size.keys)
    return *qkv(size), None, block_mask(lengths, is_causal, max(size.queries), max(size.keys))


def work(size: Sentences, direction: str) -> Work:
    queries, keys = size.queries, size.keys
    pairs = sum(q * k for q, k in zip(queries, keys, strict=True)) / (2 if size.mask == "causal" else 1)
    flops = 4 * pairs * size.heads * size.head_dim
    moved = 2 * (sum(queries) + sum(keys)) * size.heads * size.head_dim * DTYPE.itemsize
    return Work(moved, round(flops)) if direction == FORWARD else Work(3 * moved, round(3.5 * flops))


OUR = Peer(ours, inputs=packed_inputs)
PEERS = {f"{OURS}, padded": Peer(padded, inputs=padded_inputs), OURS: OUR} | ours_natively(OUR)
PEERS |= SDPA | {"torch varlen": Peer(torch_varlen, inputs=packed_inputs, gpu=True)} | flex_peer(flex_inputs)
SUITE = Suite("attention", SENTENCES, PEERS, sdpa_inputs, work)


@pytest.mark.parametrize("case", SUITE.cases(), ids=str)
def test_varlen_attention(benchmark, case):
    measure(benchmark, case)
