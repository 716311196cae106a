"""Masked softmax attention of sequences laid end to end."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from tfm.autocast import under_autocast, without_autocast
from tfm.errors import BadArgument
from tfm.operators.attention import Attended, AttendedWithLse, Attention
from tfm.operators.attention.mask_bits import mask_to_bits
from tfm.operators.autograd import apply
from tfm.ops.attention_rules import (
    check_heads,
    check_mask,
    check_offsets,
    check_rules,
    learnt_for,
    lse_with_sinks,
    mask_for,
    scaled,
    start_of,
    why_cuda_unavailable,
    widest,
    window_of,
)
from tfm.ops.backends import choose
from tfm.ops.checks import check_same_device, check_vector
from tfm.ops.dropout import seed_for
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import attention as reference
from tfm.taping import dense


@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ..., *, attn_mask: Tensor | None = ...,
    query_start: int | Tensor = ..., window_size: tuple[int, int] = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., relative_bias: Tensor | None = ..., return_lse: Literal[False] = ...,
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ..., *, attn_mask: Tensor | None = ...,
    query_start: int | Tensor = ..., window_size: tuple[int, int] = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., relative_bias: Tensor | None = ..., return_lse: Literal[True],
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ..., *, attn_mask: Tensor | None = ...,
    query_start: int | Tensor = ..., window_size: tuple[int, int] = ..., softcap: float | None = ...,
    sinks: Tensor | None = ..., relative_bias: Tensor | None = ..., return_lse: bool = ...,
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@door
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    attn_mask: Tensor | None = None,
    query_start: int | Tensor = 0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    return_lse: bool = False,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes `attention` over sequences laid end to end, without padding. Names as in `torch.nn.attention.varlen`.

    Args:
        query: [Nq, Hq, D], the queries of all sequences.
        key: [Nk, Hkv, D].
        value: [Nk, Hkv, Dv].
        cu_seq_q: int32 [B + 1], where each sequence's queries begin, and Nq.
        cu_seq_k: int32 [B + 1], where each sequence's keys begin, and Nk.
        max_q: length of the longest sequence of queries, or more.
        max_k: length of the longest sequence of keys, or more.
        dropout_p, is_causal, scale, query_start, window_size, softcap, sinks, relative_bias, seed, site, impl: as in
            `attention`; positions count within each sequence, and so does dropout: packed and padded draw the same.
        attn_mask: as in `attention`, broadcastable to [B, Hq, max_q, max_k]: of each sequence, its first rows and
            columns. A key that only rows behind its sequence's last may attend to must hold numbers.
        return_lse: also return the log of the softmax denominators.

    Returns:
        [Nq, Hq, Dv] in the dtype of `query`, or autocast's; with `return_lse` also [Nq, Hq], fp32 or wider.

    Raises:
        ValueError: as `attention`; on CPU also offsets that do not start at 0, fall, or end elsewhere than at the
            number of rows, and sequences longer than max_q or max_k. (On a GPU that would cost a device read.)
    """
    query, key, value = under_autocast(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise BadArgument(f"{name}: expected [tokens, heads, dim], got shape {tuple(tensor.shape)}")
    check_heads(query, key, value)
    if value.shape[0] != key.shape[0]:
        raise BadArgument(f"value: expected {key.shape[0]} rows like key, got {value.shape[0]}")
    check_same_device(query=query, key=key, value=value, cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k, attn_mask=attn_mask)
    check_offsets("cu_seq_q", cu_seq_q, query.shape[0], "max_q", max_q)
    check_offsets("cu_seq_k", cu_seq_k, key.shape[0], "max_k", max_k)
    batch = cu_seq_q.shape[0] - 1
    check_vector("cu_seq_k", cu_seq_k, batch + 1)
    check_rules(query, query_start, batch, window_size, softcap, sinks, relative_bias)
    if attn_mask is not None:
        check_mask(attn_mask, (batch, query.shape[1], max_q, max_k))
    refused = why_cuda_unavailable(query, value, attn_mask, None, relative_bias, max_q, max_k, False)
    backend = choose("varlen_attention", impl, widest(query, value), native_unavailable=refused)
    drawn = seed_for(dropout_p, seed, query.device)
    query, scale = scaled(query, scale)
    with without_autocast(query.device):
        if backend == "reference":
            return reference.varlen_attention(
                query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, attn_mask, dropout_p, is_causal, scale,
                query_start, window_size, softcap, sinks, relative_bias, return_lse, drawn, site,
            )  # fmt: skip
        namespace = namespace_of(backend)
        (left, right), (starts, start) = window_of(is_causal, window_size), start_of(query_start)
        bits = mask_to_bits(namespace, mask_for(backend, attn_mask, max_k), max_k, starts, start, left, right)
        logits, relative = learnt_for(backend, sinks), learnt_for(backend, relative_bias)
        call = Attention(
            query, key, value, *bits, None, logits, relative, dense(cu_seq_q), dense(cu_seq_k), None, starts, drawn,
            max_q, max_k, start, left, right, scale, softcap, dropout_p, site,
        )  # fmt: skip
        output, _, *lse = apply(AttendedWithLse if return_lse else Attended, namespace, call)
        return (output, lse_with_sinks(lse[0], logits)) if lse else output
