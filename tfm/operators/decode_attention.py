"""Attention of one query a sequence over a cache: the operator. It has no gradients: it serves inference.

kernels/decode_attention.py gives the mathematics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.operators.operator import Operator


def output_like(query: Tensor, value_cache: Tensor) -> Tensor:
    """[R, H, Dv], still empty."""
    return torch.empty((*query.shape[:2], value_cache.shape[3]), dtype=query.dtype, device=query.device)


# What it writes of the caches is the place of the latest token, where `key` and `value` are given.
DECODE_ATTENTION = Operator(
    "decode_attention(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor lengths, Tensor? parents,"
    " Tensor? key, Tensor? value, float scale) -> Tensor",
    fake=lambda query, key_cache, value_cache, *_: output_like(query, value_cache),
)
OPERATORS = (DECODE_ATTENTION,)
