"""Masked softmax attention of padded sequences."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from tfm.autocast import under_autocast, without_autocast
from tfm.errors import BadArgument
from tfm.operators.attention import Attended, AttendedWithLse, Attention, AttentionWeights
from tfm.operators.attention.gradients import RecomputedWeights, has_every_rule
from tfm.operators.attention.mask_bits import mask_to_bits
from tfm.operators.autograd import apply
from tfm.operators.calling import run
from tfm.ops.attention_rules import (
    as_row,
    check_heads,
    check_key_mask,
    check_mask,
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
from tfm.ops.checks import check_integers, check_same_device, check_vector
from tfm.ops.dropout import seed_for
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import attention as reference
from tfm.taping import computed, dense


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    relative_bias: Tensor | None = ..., key_lengths: Tensor | None = ..., key_mask: Tensor | None = ...,
    return_lse: Literal[False] = ..., return_weights: Literal[False] = ..., seed: Tensor | int | None = ...,
    site: int = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    relative_bias: Tensor | None = ..., key_lengths: Tensor | None = ..., key_mask: Tensor | None = ...,
    return_lse: Literal[True], return_weights: Literal[False] = ..., seed: Tensor | int | None = ...,
    site: int = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    relative_bias: Tensor | None = ..., key_lengths: Tensor | None = ..., key_mask: Tensor | None = ...,
    return_lse: Literal[False] = ..., return_weights: Literal[True], seed: Tensor | int | None = ...,
    site: int = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    relative_bias: Tensor | None = ..., key_lengths: Tensor | None = ..., key_mask: Tensor | None = ...,
    return_lse: Literal[True], return_weights: Literal[True], seed: Tensor | int | None = ...,
    site: int = ..., impl: str = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, query_start: int | Tensor = ...,
    window_size: tuple[int, int] = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    relative_bias: Tensor | None = ..., key_lengths: Tensor | None = ..., key_mask: Tensor | None = ...,
    return_lse: bool = ..., return_weights: bool = ..., seed: Tensor | int | None = ...,
    site: int = ..., impl: str = ...,
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip
@door
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
    relative_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Computes softmax(scale · query keyᵀ + mask) value ("Attention Is All You Need", section 3.2.1, equation 1).

    The contract of `torch.nn.functional.scaled_dot_product_attention`, and more: a query whose keys are all masked
    gives 0 and zero gradients, a float mask may learn, NaN in keys that no query may attend to stays there.

    Args:
        query: [B, Hq, Sq, D], floating point.
        key: [B, Hkv, Sk, D]; Hq is any multiple of Hkv.
        value: [B, Hkv, Sk, Dv].
        attn_mask: broadcastable to [B, Hq, Sq, Sk]: bool (True = attend), or floating point, added to the scores; the
            latter gets its gradient. Causality, masks, lengths and window combine by AND.
        dropout_p: dropout of the softmax weights, in [0, 1]. Always applied: pass 0 in eval.
        is_causal: a query attends to keys up to its own position, key <= query + query_start.
        scale: of the scores; None is 1/sqrt(D). A scalar tensor may learn: the query is multiplied by it beforehand.
        enable_gqa: accepted for torch's sake; the ratio of heads is read from the shapes.
        query_start: position of the first query among the keys, an int or integer tensor [B]; 0 = top-left as in torch,
            Sk - Sq = bottom-right.
        window_size: (left, right): keys from `left` before to `right` after the query's position; -1 = open.
        softcap: scores become softcap · tanh(scores / softcap) before the mask (Gemma 2).
        sinks: [Hq], a logit per head that takes its share of the softmax and gives no value.
        relative_bias: [Hq, 2 R + 1], floating point and finite, added to the scores besides any mask, by the distance
            of the key from the query's position, key - query - query_start; all beyond R as at R. It gets its gradient,
            the same bits on every run. `t5_bias` and `alibi_bias` of tfm.ops make such.
        key_lengths: integer [B], the valid keys of each sequence, counted from its first.
        key_mask: bool [B, Sk] (True = attend), the valid keys of each sequence in any pattern, padding on the left
            among them. Beside a mask that has no batch, nothing of [B, Hq, Sq, Sk] is made of the two, nor of their
            gradient.
        return_lse: also return the log of the softmax denominators.
        return_weights: also return the softmax weights, as dropout leaves them.
        seed: of the dropout: an int or int64 scalar tensor; None draws one.
        site: which of the dropouts that share a seed this is.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

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
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    check_heads(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch:
            raise BadArgument(f"{name}: expected batch {batch} like query, got {tensor.shape[0]}")
    if value.shape[2] != keys:
        raise BadArgument(f"value: expected length {keys} like key, got {value.shape[2]}")
    if attn_mask is not None:
        check_mask(attn_mask, (batch, heads, queries, keys))
    check_vector("key_lengths", key_lengths, batch)
    check_integers(key_lengths=key_lengths)
    check_key_mask(key_mask, (batch, keys))
    check_same_device(
        query=query, key=key, value=value, attn_mask=attn_mask, key_lengths=key_lengths, key_mask=key_mask
    )  # fmt: skip
    check_rules(query, query_start, batch, window_size, softcap, sinks, relative_bias)
    query, scale = scaled(query, scale)
    carriers = (query, key, attn_mask, sinks, relative_bias)
    carry = return_weights and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in carriers)
    reason = ""
    if carry and torch.compiler.is_compiling():
        reason = "weights that may carry gradients come from the reference under torch.compile"
    refused = why_cuda_unavailable(query, value, attn_mask, key_mask, relative_bias, queries, keys, return_weights)
    backend = choose("attention", impl, widest(query, value), reason, native_unavailable=refused)
    drawn = seed_for(dropout_p, seed, query.device)
    rules = dropout_p, is_causal, scale, query_start, window_size, softcap
    with without_autocast(query.device):
        if backend == "reference":
            return reference.attention(
                query, key, value, attn_mask, *rules, sinks, relative_bias, key_lengths, key_mask,
                return_lse, return_weights, drawn, site,
            )  # fmt: skip
        namespace = namespace_of(backend)
        (left, right), (starts, start) = window_of(is_causal, window_size), start_of(query_start)
        mask, valid = attn_mask, dense(key_mask)
        if valid is not None and mask is None and not has_every_rule(namespace, query.device):
            mask, valid = computed(as_row, valid), None
        bits = mask_to_bits(namespace, mask_for(backend, mask, keys), keys, starts, start, left, right)
        logits, relative = learnt_for(backend, sinks), learnt_for(backend, relative_bias)
        call = Attention(
            query, key, value, *bits, valid, logits, relative, None, None, dense(key_lengths), starts, drawn,
            queries, keys, start, left, right, scale, softcap, dropout_p, site,
        )  # fmt: skip
        output, statistics, *lse = apply(AttendedWithLse if return_lse else Attended, namespace, call)
        results = [output, *(lse_with_sinks(x, logits) for x in lse)]
        if return_weights:
            detached = (x.detach() if isinstance(x, Tensor) else x for x in (statistics, *call))
            weights = run(namespace, AttentionWeights(*detached))
            if carry:

                def recompute(
                    query: Tensor, key: Tensor, attn_mask: Tensor | None, sinks: Tensor | None,
                    relative_bias: Tensor | None,
                ) -> Tensor:  # fmt: skip
                    return reference.attention(
                        query, key, value.detach(), attn_mask, *rules, sinks, relative_bias, key_lengths, key_mask,
                        False, True, drawn, site,
                    )[1]  # fmt: skip

                weights = RecomputedWeights.apply((weights,), recompute, *carriers)
            results.append(weights)
    return results[0] if len(results) == 1 else tuple(results)
