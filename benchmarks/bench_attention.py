"""Self-attention of a ragged batch: ours packed and padded, against SDPA on the padded batch with a padding mask.

GFLOP/s counts the two products of each sentence with itself, without padding; backward counts as two and a half times
forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.measure import DEVICE, measure_both, measure_forward, random
from benchmarks.shapes import ATTENTIONS, Sentences
from tfm import ops
from tfm.sequences import offsets

SIZES = ATTENTIONS


def packed(query, key, value, lengths, longest):
    cu_seq = offsets(lengths)
    return ops.varlen_attention(query, key, value, cu_seq, cu_seq, longest, longest)


def padded(query, key, value, lengths, longest):
    return ops.attention(query, key, value, key_lengths=lengths)


def sdpa(query, key, value, lengths, longest):
    mask = torch.arange(longest, device=query.device) < lengths[:, None]
    return F.scaled_dot_product_attention(query, key, value, mask[:, None, None])


PEERS = {"ours, packed": packed, "ours, padded": padded, "eager": sdpa, "compile": sdpa}


def inputs(size: Sentences, peer: str):
    lengths = size.lengths()
    shape: tuple[int, ...] = (len(lengths), size.heads, max(lengths), size.head_dim)
    if peer == "ours, packed":
        shape = (sum(lengths), size.heads, size.head_dim)
    return *(random(*shape) for _ in range(3)), torch.tensor(lengths, dtype=torch.int32, device=DEVICE), max(lengths)


def flops(size: Sentences) -> int:
    return sum(4 * length**2 * size.heads * size.head_dim for length in size.lengths())


def test_attention_forward(benchmark, function, size, peer):
    measure_forward(benchmark, function, inputs(size, peer), flops=flops(size))


def test_attention_forward_and_backward(benchmark, function, size, peer):
    measure_both(benchmark, function, inputs(size, peer), flops=int(3.5 * flops(size)))
