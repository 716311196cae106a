"""Attention of one query a sequence over a cache: the operator. It has no gradients: it serves inference.

kernels/decode_attention.py gives the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Changed, Row, operator

ROWS = (
    Row(("decode_attention",), "triton", FLOATS, max_columns=512),
    Row(("decode_attention",), "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
)


@operator("decode_attention")
class DecodeAttention(NamedTuple):
    """softmax(scale · query keysᵀ) values, one query a row.

    Where `key` and `value` are given, it writes them into the caches, at the place of the latest token.

    Attributes:
        query: [R, H, D].
        key_cache: [R', capacity, Hkv, D], columns side by side.
        value_cache: [R', capacity, Hkv, Dv], columns side by side.
        lengths: int32 [R], how many places each row attends to.
        parents: int32 [R, capacity], the row of the caches for each place; None is each row's own.
        key: [R, Hkv, D], the latest token's; None where the caches hold it already.
        value: [R, Hkv, Dv], given where `key` is.
        scale: of the scores.
    """

    query: Tensor
    key_cache: Changed
    value_cache: Changed
    lengths: Tensor
    parents: Tensor | None
    key: Tensor | None
    value: Tensor | None
    scale: float

    def outputs(self) -> Tensor:
        """Returns an empty [R, H, Dv]."""
        query = self.query
        return torch.empty((*query.shape[:2], self.value_cache.shape[3]), dtype=query.dtype, device=query.device)
