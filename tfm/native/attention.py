"""What tfm.ops calls of native attention: the shared entry, for masks and sinks of dtypes that csrc reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfm.native import NAMESPACE
from tfm.operators import attention as operators

# In which csrc reads masks and sinks: its kernels for CPUs know no fp16.
READABLE = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


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
    if x is None or not x.is_floating_point() or x.dtype in READABLE[x.device.type]:
        return x
    return x.float()


def cuda_obstacle(
    query: Tensor, value: Tensor, attn_mask: Tensor | None, max_q: int, max_k: int, return_weights: bool
) -> str:
    """Why csrc/cuda/short_attention.cu cannot compute this, in words; empty where it can, or where it is not asked."""
    if query.device.type != "cuda":
        return ""
    dims = query.shape[-1], value.shape[-1]
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"expected float16 or bfloat16 on a GPU, got {query.dtype}"
    if any(dim % 8 or not 0 < dim <= 64 for dim in dims):
        return f"expected head dims that are multiples of 8 up to 64 on a GPU, got {dims[0]} and {dims[1]}"
    if max_q > 256 or max_k > 256:
        return f"expected at most 256 queries and 256 keys on a GPU, got {max_q} and {max_k}"
    if attn_mask is not None and attn_mask.is_floating_point() and attn_mask.requires_grad:
        return "a bias that learns has its gradient from Triton on a GPU"
    return "the weights come from Triton on a GPU" if return_weights else ""
