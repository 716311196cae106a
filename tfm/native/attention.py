"""What tfm.ops calls of native attention: the shared entry, for masks and sinks of dtypes that csrc reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfm.native import NAMESPACE
from tfm.operators import attention as operators

LEARNT = (torch.float32, torch.bfloat16)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float, query_start: int | Tensor, window_size: tuple[int, int], softcap: float | None,
    sinks: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """As tfm.operators.attention.attention."""
    return operators.attention(
        NAMESPACE, query, key, value, _readable(attn_mask), dropout_p, is_causal, scale, query_start, window_size,
        softcap, _readable(sinks), *options,
    )  # fmt: skip


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, scale: float, query_start: int | Tensor, window_size: tuple[int, int],
    softcap: float | None, sinks: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As tfm.operators.attention.varlen_attention."""
    return operators.varlen_attention(
        NAMESPACE, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, dropout_p, is_causal, scale, query_start,
        window_size, softcap, _readable(sinks), *options,
    )  # fmt: skip


def _readable(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.is_floating_point() and x.dtype not in LEARNT else x
