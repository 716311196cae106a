"""Masked softmax attention, padded and packed."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from tfm.autocast import under_autocast, without_autocast
from tfm.errors import BadArgument
from tfm.native.attention import cuda_obstacle
from tfm.ops.backends import choose
from tfm.ops.checks import (
    broadcasts,
    check_floating,
    check_integers,
    check_same_device,
    check_softcap,
    check_vector,
)
from tfm.ops.dropout import seed_for
from tfm.reference import attention as reference
from tfm.transforms import gradients, is_readable


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ..., return_lse: Literal[False] = ..., return_weights: Literal[False] = ...,
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ..., return_lse: Literal[True], return_weights: Literal[False] = ...,
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ..., return_lse: Literal[False] = ..., return_weights: Literal[True],
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ..., return_lse: Literal[True], return_weights: Literal[True],
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    key_lengths: Tensor | None = ..., return_lse: bool = ..., return_weights: bool = ...,
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_start: int | Tensor = 0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale · query keyᵀ + mask) value ("Attention Is All You Need", section 3.2.1, equation 1).

    The contract of `torch.nn.functional.scaled_dot_product_attention`, and more: a query whose keys are all masked
    gives 0 and zero gradients, a float mask may learn, NaN in keys that no query may attend to stays there.

    Args:
        query: [B, Hq, Sq, D], floating point.
        key: [B, Hkv, Sk, D]; Hq is any multiple of Hkv.
        value: [B, Hkv, Sk, Dv].
        attn_mask: broadcastable to [B, Hq, Sq, Sk]: bool (True = attend), or floating point, added to the scores; the
            latter gets its gradient. Causality, mask, lengths and window combine by AND.
        dropout_p: dropout of the softmax weights, in [0, 1]. Always applied: pass 0 in eval.
        is_causal: a query attends to keys up to its own position, key <= query + query_start.
        scale: of the scores; None is 1/sqrt(D). A scalar tensor may learn: the query is multiplied by it beforehand.
        enable_gqa: accepted for torch's sake; the ratio of heads is read from the shapes.
        query_start: position of the first query among the keys, an int or integer tensor [B]; 0 = top-left as in torch,
            Sk - Sq = bottom-right.
        window_size: (left, right): keys from `left` before to `right` after the query's position; -1 = open.
        softcap: scores become softcap · tanh(scores / softcap) before the mask (Gemma 2).
        sinks: [Hq], a logit per head that takes its share of the softmax and gives no value.
        key_lengths: integer [B], the valid keys of each sequence, counted from its first.
        return_lse: also return the log of the softmax denominators.
        return_weights: also return the softmax weights, as dropout leaves them.
        seed: of the dropout: an int or int64 scalar tensor; None draws one.
        site: which of the dropouts that share a seed this is.
        impl: backend; see tfm.ops.backends.

    Returns:
        [B, Hq, Sq, Dv] in the dtype of `query`, or autocast's; with `return_lse` also [B, Hq, Sq], fp32 or wider,
        with `return_weights` also [B, Hq, Sq, Sk] in that dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a probability outside [0, 1], a backend that cannot run.
    """
    query, key, value = under_autocast(query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise BadArgument(f"{name}: expected [batch, heads, length, dim], got shape {tuple(tensor.shape)}")
    batch, query_heads, query_length, _ = query.shape
    _check_heads(query, key, value, heads=1, dim=3)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch:
            raise BadArgument(f"{name}: expected batch {batch} as query, got {tensor.shape[0]}")
    if value.shape[2] != key.shape[2]:
        raise BadArgument(f"value: expected length {key.shape[2]} as key, got {value.shape[2]}")
    if attn_mask is not None:
        _check_mask(attn_mask, (batch, query_heads, query_length, key.shape[2]))
    check_vector("key_lengths", key_lengths, batch)
    check_integers(key_lengths=key_lengths)
    check_same_device(query=query, key=key, value=value, attn_mask=attn_mask, sinks=sinks, key_lengths=key_lengths)
    _check_common(query, query_start, batch, window_size, softcap, sinks, query_heads)
    query, scale = scaled(query, scale)
    carriers = (query, key, attn_mask, sinks)
    carry = return_weights and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in carriers)
    reason = ""
    if carry and torch.compiler.is_compiling():
        reason = "weights that may carry gradients come from the reference under torch.compile"
    refused = cuda_obstacle(query, value, attn_mask, query_length, key.shape[2], return_weights)
    backend = choose("attention", impl, _widest(query, value), reason, native_obstacle=refused)
    drawn = seed_for(dropout_p, seed, query.device)
    rules = dropout_p, is_causal, scale, query_start, window_size, softcap
    with without_autocast(query.device):
        if backend == "reference":
            return reference.attention(
                query, key, value, attn_mask, *rules, sinks, key_lengths, return_lse, return_weights, drawn, site
            )
        output, lse, weights = _entry(backend).attention(
            query, key, value, attn_mask, *rules, sinks, key_lengths, return_lse, return_weights, drawn, site
        )
        if carry:

            def recompute(query: Tensor, key: Tensor, attn_mask: Tensor | None, sinks: Tensor | None) -> Tensor:
                return reference.attention(
                    query, key, value.detach(), attn_mask, *rules, sinks, key_lengths, False, True, drawn, site,
                )[1]  # fmt: skip

            weights = _Weights.apply((weights,), recompute, *carriers)
    results = (output, *[lse] * return_lse, *[weights] * return_weights)
    return results[0] if len(results) == 1 else results


@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    return_lse: Literal[False] = ..., seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    return_lse: Literal[True], seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float = ..., is_causal: bool = ..., scale: float | None = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ..., return_lse: bool = ...,
    seed: Tensor | int | None = ..., site: int = ..., impl: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
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
    query_start: int | Tensor = 0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences laid end to end, without padding. Names as in `torch.nn.attention.varlen`.

    Args:
        query: [Nq, Hq, D], the queries of all sequences.
        key: [Nk, Hkv, D].
        value: [Nk, Hkv, Dv].
        cu_seq_q: int32 [B + 1], where each sequence's queries begin, and Nq.
        cu_seq_k: int32 [B + 1], where each sequence's keys begin, and Nk.
        max_q: length of the longest sequence of queries, or more.
        max_k: length of the longest sequence of keys, or more.
        dropout_p, is_causal, scale, query_start, window_size, softcap, sinks, seed, site, impl: as in `attention`;
            positions count within each sequence, and so does dropout: packed and padded draw the same mask.
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
    _check_heads(query, key, value, heads=1, dim=2)
    if value.shape[0] != key.shape[0]:
        raise BadArgument(f"value: expected {key.shape[0]} rows as key, got {value.shape[0]}")
    check_same_device(query=query, key=key, value=value, cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k, sinks=sinks)
    _check_offsets("cu_seq_q", cu_seq_q, query.shape[0], "max_q", max_q)
    _check_offsets("cu_seq_k", cu_seq_k, key.shape[0], "max_k", max_k)
    batch = cu_seq_q.shape[0] - 1
    check_vector("cu_seq_k", cu_seq_k, batch + 1)
    _check_common(query, query_start, batch, window_size, softcap, sinks, query.shape[1])
    refused = cuda_obstacle(query, value, None, max_q, max_k, False)
    backend = choose("varlen_attention", impl, _widest(query, value), native_obstacle=refused)
    drawn = seed_for(dropout_p, seed, query.device)
    query, scale = scaled(query, scale)
    packed = query, key, value, cu_seq_q, cu_seq_k, max_q, max_k
    rules = dropout_p, is_causal, scale, query_start, window_size, softcap
    with without_autocast(query.device):
        if backend == "reference":
            return reference.varlen_attention(*packed, *rules, sinks, return_lse, drawn, site)
        output, lse = _entry(backend).varlen_attention(*packed, *rules, sinks, return_lse, drawn, site)
        return (output, lse) if return_lse else output


def scaled(query: Tensor, scale: float | Tensor | None) -> tuple[Tensor, float]:
    """The query and the number that its scores are scaled by: a tensor is multiplied in, so that it may learn."""
    if not isinstance(scale, Tensor):
        return query, 1 / math.sqrt(query.shape[-1] or 1) if scale is None else scale
    if scale.dim() != 0:
        raise BadArgument(f"scale: expected a number or a scalar tensor, got shape {tuple(scale.shape)}")
    return query * scale, 1.0


def _entry(backend: str) -> Any:
    """The module whose functions compute on `backend`."""
    if backend == "native":
        from tfm.native import attention as entry

        return entry
    from tfm.kernels.attention import operators

    return operators


class _Weights(torch.autograd.Function):
    """The kernel's softmax weights; the reference computes them again where someone wants their gradient."""

    @staticmethod
    def forward(
        ctx: Any, computed: tuple[Tensor], recompute: Callable[..., Tensor], *carriers: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*carriers)
        ctx.recompute = recompute
        # As part of a tuple it is a result to autograd, not a view of an argument: it can be changed in place.
        return computed[0]

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        carriers, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        return None, None, *gradients(lambda *given: (ctx.recompute(*given),), carriers, needed, (dweights,))


def _widest(query: Tensor, value: Tensor) -> Tensor:
    """The one whose columns limit what kernels serve."""
    return value if value.shape[-1] > query.shape[-1] else query


def _check_heads(query: Tensor, key: Tensor, value: Tensor, heads: int, dim: int) -> None:
    check_floating(query=query, key=key, value=value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise BadArgument(f"{name}: expected {query.dtype} as query, got {tensor.dtype}")
    if key.shape[dim] != query.shape[dim]:
        raise BadArgument(f"key: expected dim {query.shape[dim]} as query, got {key.shape[dim]}")
    if value.shape[heads] != key.shape[heads]:
        raise BadArgument(f"value: expected {key.shape[heads]} heads as key, got {value.shape[heads]}")
    if key.shape[heads] == 0 or query.shape[heads] % key.shape[heads]:
        raise BadArgument(f"query: expected a multiple of key's {key.shape[heads]} heads, got {query.shape[heads]}")


def _check_mask(mask: Tensor, full: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise BadArgument(f"attn_mask: expected bool (True = attend) or floating point (added), got {mask.dtype}")
    if not broadcasts(mask.shape, full):
        raise BadArgument(f"attn_mask: expected a shape broadcastable to {full}, got {tuple(mask.shape)}")


def _check_common(
    query: Tensor,
    query_start: int | Tensor,
    batch: int,
    window_size: tuple[int, int],
    softcap: float | None,
    sinks: Tensor | None,
    query_heads: int,
) -> None:
    if isinstance(query_start, Tensor):
        check_vector("query_start", query_start, batch)
        check_integers(query_start=query_start)
        check_same_device(query=query, query_start=query_start)
    if len(window_size) != 2:
        raise ValueError(f"window_size: expected (left, right), got {window_size}")
    check_softcap(softcap)
    check_vector("sinks", sinks, query_heads)
    check_floating(sinks=sinks)


def _check_offsets(name: str, cu_seq: Tensor, rows: int, max_name: str, max_length: int) -> None:
    if cu_seq.dim() != 1 or cu_seq.shape[0] == 0:
        raise BadArgument(f"{name}: expected [B + 1], got shape {tuple(cu_seq.shape)}")
    check_integers(**{name: cu_seq})
    if not is_readable(cu_seq):
        return
    values = cu_seq.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] != 0:
        raise BadArgument(f"{name}: expected offsets that start at 0, got {values[0]}")
    if min(lengths, default=0) < 0:
        raise BadArgument(f"{name}: expected offsets that never fall, got {values}")
    if values[-1] != rows:
        raise BadArgument(f"{name}: expected offsets that end at the {rows} rows given, got {values[-1]}")
    longest = max(lengths, default=0)
    if longest > max_length:
        raise BadArgument(f"{max_name}: expected at least the longest sequence, {longest}, got {max_length}")
