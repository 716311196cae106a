"""Masked softmax attention: the operators, their autograd, and what each backend's entry calls.

kernels/attention gives the mathematics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfm.operators.heads import joined_parts
from tfm.operators.mask_bits import MASK_BITS, mask_of_bits, mask_to_bits
from tfm.operators.operator import Operator, distinct
from tfm.reference import attention as reference
from tfm.transforms import Recomputed, differentiable_by

# Call's attributes, in its order.
ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? words, Tensor? reach, Tensor? sinks,"
    " Tensor? cu_seq_q, Tensor? cu_seq_k, Tensor? key_lengths, Tensor? starts, Tensor? seed, SymInt max_q,"
    " SymInt max_k, SymInt start, int? left, int? right, float scale, float? softcap, float dropout_p, int site"
)
# The first so many of them are tensors, and these of the operator's results have gradients, in this order.
TENSORS = 12
LEARNABLE = (0, 1, 2, 3, 6)
# Farther than any key, and the sum of three such numbers still fits 32 bits.
FAR = 1 << 29


@dataclass(frozen=True)
class Call:
    """The arguments of the operator: the mask as bits, and the rules as tfm.kernels.attention.scores states them.

    Attributes:
        query: [B, Hq, Sq, D], or packed [Nq, Hq, D]; any strides, as `key` and `value`.
        key: [B, Hkv, Sk, D] or [Nk, Hkv, D].
        value: [B, Hkv, Sk, Dv] or [Nk, Hkv, Dv].
        bias: [B|1, Hq|1, Sq|1, Sk], or None, as all below may be.
        words: int32 [B|1, Hq|1, Sq, W], a bit for each key that a query may attend to.
        reach: int32 [B|1, Hq|1, W], a bit for each key that some query may attend to.
        sinks: [Hq].
        cu_seq_q: [B + 1], with `cu_seq_k` where packed.
        cu_seq_k: [B + 1].
        key_lengths: [B], where padded.
        starts: [B], the position of each sequence's first query; None is `start` for all.
        seed: int64 scalar; None where nothing is dropped.
        max_q: packed, at least the longest sequence's queries; else Sq.
        max_k: likewise of keys.
        start: see `starts`.
        left: the window's side, None where open.
        right: likewise.
        scale: of the scores.
        softcap: of the scores.
        dropout_p: of the softmax weights.
        site: of the dropout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    words: Tensor | None
    reach: Tensor | None
    sinks: Tensor | None
    cu_seq_q: Tensor | None
    cu_seq_k: Tensor | None
    key_lengths: Tensor | None
    starts: Tensor | None
    seed: Tensor | None
    max_q: int
    max_k: int
    start: int
    left: int | None
    right: int | None
    scale: float
    softcap: float | None
    dropout_p: float
    site: int

    @property
    def is_packed(self) -> bool:
        return self.cu_seq_q is not None

    @property
    def sequences(self) -> int:
        return self.query.shape[0] if self.cu_seq_q is None else self.cu_seq_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def dims(self) -> tuple[int, int]:
        """(D, Dv)."""
        return self.query.shape[-1], self.value.shape[-1]


def rows_like(x: Tensor, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """Empty, of the shape of `x` but for the last dimension, dense, its dimensions in memory as those of `x` are.

    So a [B, S, H, D] projection seen as [B, H, S, D] has an output whose heads lie side by side again.
    """
    order = sorted(range(x.dim() - 1), key=lambda dim: (x.stride(dim), -dim), reverse=True)
    # No view of another tensor, which autograd would not let anyone change in place.
    shape, layout = (*x.shape[:-1], columns), (*order, x.dim() - 1)
    return torch.empty_permuted(shape, layout, dtype=dtype or x.dtype, device=x.device)


def row_statistics(query: Tensor) -> Tensor:
    """Empty fp32, two numbers for each query and head: [2, B, Hq, Sq], or [2, Nq, Hq] whose heads lie apart.

    The first is top, the largest score in natural units, sink included; the second log2 Σ exp(s - top), from 0 up.
    They stay apart, since their sum would round the second away where scores are huge (a mask of finfo.min): a weight
    is exp2((s - top) · log2(e) - log2 Σ), at most 1. Without keys top is -inf and the sum's logarithm 0, sink or not.
    """
    if query.dim() == 4:
        return torch.empty((2, *query.shape[:-1]), dtype=torch.float32, device=query.device)
    rows, heads, _ = query.shape
    return torch.empty((2, heads, rows), dtype=torch.float32, device=query.device).transpose(1, 2)


def forward_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What the forward fills, still empty: (out, statistics), the latter as `row_statistics` says."""
    return rows_like(query, value.shape[-1]), row_statistics(query)


def empty_weights(call: Call) -> Tensor:
    """What attention_weights fills, still empty."""
    shape = (call.sequences, call.heads, call.max_q, call.max_k)
    return torch.empty(shape, dtype=call.query.dtype, device=call.query.device)


def _empty_gradients(
    dout: Tensor, dlse: Tensor | None, output: Tensor, statistics: Tensor, wanted: list[bool], *arguments: Any
) -> tuple[Tensor | None, ...]:
    call = Call(*arguments)
    inputs = (call.query, call.key, call.value, call.bias, call.sinks)
    return tuple(
        None if x is None or not is_wanted else rows_like(x, x.shape[-1]) if x.dim() > 2 else torch.empty_like(x)
        for x, is_wanted in zip(inputs, wanted, strict=True)
    )


ATTENTION = Operator(
    f"attention({ARGUMENTS}) -> (Tensor output, Tensor statistics)",
    fake=lambda query, key, value, *_: forward_outputs(query, value),
)
ATTENTION_BACKWARD = Operator(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor output, Tensor statistics, bool[] wanted, {ARGUMENTS})"
    " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    fake=_empty_gradients,
)
ATTENTION_WEIGHTS = Operator(
    f"attention_weights(Tensor statistics, {ARGUMENTS}) -> Tensor",
    fake=lambda statistics, *arguments: empty_weights(Call(*arguments)),
)
OPERATORS = (ATTENTION, ATTENTION_BACKWARD, ATTENTION_WEIGHTS, MASK_BITS)


def _empty_joined_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    wanted: list[bool],
    parts: int,
    *arguments: Any,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    key = Call(*arguments).key
    # As key's tokens lie in memory, in each of them the parts side by side.
    tokens = sorted(range(0, key.dim() - 1, 2), key=lambda dim: (key.stride(dim), -dim), reverse=True)
    joined = key.new_empty([key.shape[dim] for dim in tokens] + [parts, key.shape[1], key.shape[-1]])
    places = [tokens.index(dim) if dim in tokens else len(tokens) + 1 for dim in range(key.dim() - 1)]
    separate = [wanted[0] and parts == 2, False, False, *wanted[3:]]
    dquery, _, _, dbias, dsinks = _empty_gradients(dout, dlse, output, statistics, separate, *arguments)
    return dquery, joined.permute(len(tokens), *places, -1), dbias, dsinks


# Of csrc alone: attention_backward, of two or three views of one projection, whose gradients lie as they do.
ATTENTION_BACKWARD_JOINED = Operator(
    "attention_backward_joined(Tensor dout, Tensor? dlse, Tensor output, Tensor statistics, bool[] wanted, int parts,"
    f" {ARGUMENTS}) -> (Tensor? dquery, Tensor joined, Tensor? dbias, Tensor? dsinks)",
    fake=_empty_joined_gradients,
)


def _recompute(ctx, *grads: Tensor | None) -> Recomputed:
    def outputs(_, __, *arguments):
        output, lse = in_torch(Call(*arguments))
        return output, None, lse

    return outputs, (None, None, *ctx.saved_tensors[:TENSORS], *ctx.rules)


def in_torch(call: Call) -> tuple[Tensor, Tensor]:
    """(output, lse) in torch's own operations; lse is the natural one, of the sink alone for a query without keys."""
    window = tuple(-1 if side is None else side for side in (call.left, call.right))
    start = call.start if call.starts is None else call.starts
    tensors = (call.query, call.key, call.value)
    rules = (call.dropout_p, False, call.scale, start, window, call.softcap, call.sinks)
    arguments: list[Any]
    if call.is_packed:
        arguments = [*tensors, call.cu_seq_q, call.cu_seq_k, call.max_q, call.max_k, *rules, True, call.seed, call.site]
        return reference.varlen_attention(*arguments)
    mask = mask_of_bits(call.bias, call.words, call.reach, call.max_k)
    arguments = [*tensors, mask, *rules, call.key_lengths, True, False, call.seed, call.site]
    return reference.attention(*arguments)


class Attention(torch.autograd.Function):
    """Autograd of the operator: output, its statistics for the backward, and, where asked for, the natural lse."""

    # Not setup_context, whose arguments torch binds by name.
    @staticmethod
    def forward(ctx, namespace, with_natural, *arguments):
        output, statistics = getattr(torch.ops, namespace).attention.default(*arguments)
        ctx.save_for_backward(*arguments[:TENSORS], output, statistics)
        ctx.namespace, ctx.rules = namespace, arguments[TENSORS:]
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return output, statistics, statistics[0] + statistics[1] * math.log(2) if with_natural else None

    @staticmethod
    @differentiable_by(_recompute)
    def backward(ctx, dout, _, dlse):
        *tensors, output, statistics = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[2 + place] for place in LEARNABLE]
        dout = torch.zeros_like(output) if dout is None else dout
        operators = getattr(torch.ops, ctx.namespace)
        parts = joined_parts(tuple(tensors[:3]), wanted) if ctx.namespace == "tfm_native" else 0
        if parts:
            dq, joined, dbias, dsinks = operators.attention_backward_joined.default(
                dout, dlse, output, statistics, wanted, parts, *tensors, *ctx.rules
            )
            found = (*[dq] * (3 - parts), *joined.unbind(), dbias, dsinks)
        else:
            found = operators.attention_backward.default(dout, dlse, output, statistics, wanted, *tensors, *ctx.rules)
        gradients = dict(zip(LEARNABLE, found, strict=True))
        return None, None, *(gradients.get(place) for place in range(TENSORS + len(ctx.rules)))


def attention(
    namespace: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float, query_start: int | Tensor, window_size: tuple[int, int], softcap: float | None,
    sinks: Tensor | None, key_lengths: Tensor | None, return_lse: bool, return_weights: bool, seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(output, lse, weights) of tfm.ops.attention, None where not asked for; the weights have no gradient."""
    left, right = window_of(is_causal, window_size)
    starts, start = start_of(query_start)
    bias, words, reach = mask_to_bits(namespace, attn_mask, key.shape[2], starts, start, left, right)
    seed = None if seed is None else seed.to(query.device)
    arguments = (
        query, key, value, bias, words, reach, sinks, None, None, key_lengths, starts, seed,
        query.shape[2], key.shape[2], start, left, right, scale, softcap, dropout_p, site,
    )  # fmt: skip
    output, statistics, natural = Attention.apply(namespace, return_lse, *distinct(arguments))
    weights = None
    if return_weights:
        detached = (x.detach() if isinstance(x, Tensor) else x for x in (statistics, *arguments))
        weights = getattr(torch.ops, namespace).attention_weights.default(*detached)
    return output, _with_sinks(natural, sinks), weights


def varlen_attention(
    namespace: str, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, dropout_p: float, is_causal: bool, scale: float, query_start: int | Tensor,
    window_size: tuple[int, int], softcap: float | None, sinks: Tensor | None, return_lse: bool, seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(output, lse) of tfm.ops.varlen_attention; lse is None where not asked for."""
    left, right = window_of(is_causal, window_size)
    starts, start = start_of(query_start)
    seed = None if seed is None else seed.to(query.device)
    arguments = (
        query, key, value, None, None, None, sinks, cu_seq_q, cu_seq_k, None, starts, seed,
        max_q, max_k, start, left, right, scale, softcap, dropout_p, site,
    )  # fmt: skip
    output, _, natural = Attention.apply(namespace, return_lse, *distinct(arguments))
    return output, _with_sinks(natural, sinks)


def window_of(is_causal: bool, window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """(left, right) of the operator; None where that side is open."""
    left, right = window_size[0], 0 if is_causal else window_size[1]
    return None if left < 0 else min(left, FAR), None if right < 0 else min(right, FAR)


def start_of(query_start: int | Tensor) -> tuple[Tensor | None, int]:
    """`query_start` as (a start for each sequence or None, a start for all)."""
    if isinstance(query_start, int):
        return None, max(-FAR, min(query_start, FAR))
    return query_start.contiguous(), 0


def _with_sinks(lse: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """The kernels' lse is -inf for a query without keys; its softmax is over the sink alone."""
    if lse is None or sinks is None:
        return lse
    sink = sinks.float() if lse.dim() == 2 else sinks.float()[:, None]
    return torch.where(lse == float("-inf"), sink, lse)
