"""Scores, and what their softmax leaves of each row.

The score of query i and key j is

    s = unit · x + bias        x = q·k, unit = scale      or      x = tanh(scale / softcap · q·k), unit = softcap

and its derivative by q·k is scale · slope, slope = 1 or 1 - tanh². The bias is an element of its own, or one of a few
by the key's distance from the query's position, clip(j - position(i), -R, R) (Shaw et al., "Self-Attention with
Relative Position Representations", 2018, section 3.2), or the sum of both. With one, scores themselves are formed,
rounded once more, as torch has them; without one, x. tfm.kernels.softmax makes weights of either. A sink is one more
score of each row, of a key without a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import tanh
from tfm.kernels.attention.heads import head_of
from tfm.kernels.softmax import LOG2E, exponent, fma, natural_top
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention, AttentionBackward, Gradients


class Score(NamedTuple):
    """The numbers that a score is made with.

    Attributes:
        inner: factor of q·k.
        outer: factor of its tanh; None where uncapped.
        scale: their product.
        sinks: a score for each head; None where there are none, or where a kernel has no use for them.
        relative_bias: dense [Hq, 2 R + 1]; None where there is none.
        farthest: R.
    """

    inner: float
    outer: float | None
    scale: float
    sinks: Tensor | None
    relative_bias: Tensor | None
    farthest: int

    @classmethod
    def of(cls, call: Attention, with_sink: bool) -> Score:
        """Returns that of a call."""
        scale, softcap = call.scale, call.softcap
        relative = call.relative_bias
        rest = call.sinks if with_sink else None, relative, 0 if relative is None else relative.shape[1] // 2
        return cls(scale, None, scale, *rest) if softcap is None else cls(scale / softcap, softcap, scale, *rest)


@triton.jit
def unit_of(score):
    """Returns the unit of x: scale or softcap."""
    return tl.cast(score.inner if score.outer is None else score.outer, tl.float32)


@triton.jit
def scores_of(products, score, unit, bias, sequence, head, row, column, position, inside):
    """Computes (scores, or x without a bias; slope) of a tile of products q·k; slope is 1.0 uncapped.

    Of the bias 0 is added where not `inside`; `row` and `column` broadcast to the tile, in either order.
    """
    x, slope = bend(products, score)
    if bias is not None or score.relative_bias is not None:
        added = 0.0
        if bias is not None:
            address = head_of(bias, sequence, head, 0) + row.to(tl.int64) * bias.s + column.to(tl.int64) * bias.d
            added = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        if score.relative_bias is not None:
            added += relative_tile(score, head, row, column, position, inside)
        x = add_bias(x, unit, added)
    return x, slope


@triton.jit
def relative_tile(score, head, row, column, position, inside):
    """Loads the bias by distance of a tile's scores: fp32, 0 where not `inside`; `head` is int64."""
    distance = tl.minimum(tl.maximum(column - row - position, -score.farthest), score.farthest)
    address = score.relative_bias + head * (2 * score.farthest + 1) + (distance + score.farthest)
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def bend(products, score):
    """Computes (x, slope) of a tile of products q·k."""
    x, slope = products, 1.0
    if score.outer is not None:
        x = tanh(products * tl.cast(score.inner, tl.float32))
        slope = 1.0 - x * x
    return x, slope


@triton.jit
def add_bias(x, unit, bias):
    """Computes the scores of a tile of x with a bias: -inf stays -inf, whatever x is there."""
    return tl.where(bias == float("-inf"), float("-inf"), fma(x, unit, bias))


@triton.jit
def finish_rows(top, total, unit, score, head, keep_scale, IS_FORMED: tl.constexpr):
    """Computes (is_empty, top, log_sum, norm) of rows [R] after their last key, with their head's sink, if any.

    `total` is Σ exp(s - top), 0 without keys, which no sink changes; `norm` makes outputs of sums under that top.
    """
    is_empty = total == 0.0
    top, excess = natural_top(tl.where(is_empty, 0.0, top), unit, IS_FORMED)
    shrink = 1.0
    if score.sinks is not None:
        sink = tl.load(score.sinks + head).to(tl.float32)
        higher = tl.maximum(top, sink)
        shrink = tl.exp2((top - higher) * LOG2E + excess)
        total = total * shrink + tl.exp2((sink - higher) * LOG2E)
        top, excess = higher, tl.zeros_like(excess)
    total = tl.where(is_empty, 1.0, total)
    log_sum = tl.where(is_empty, 0.0, tl.log2(total) + excess)
    norm = tl.cast(keep_scale, tl.float32) / total * shrink
    return is_empty, tl.where(is_empty, float("-inf"), top), log_sum, norm


@triton.jit
def sink_gradient(score, head, top, log_sum, difference):
    """Computes the parts of rows [R] in the gradient of their head's sink, -p_sink · delta."""
    sink = tl.load(score.sinks + head).to(tl.float32)
    weight = tl.exp2(exponent(sink, 1.0, top, log_sum, 0.0, IS_FORMED=True))
    return tl.where(top < float("inf"), -weight * difference, 0.0)


def sink_partials(tape: Tape, call: AttentionBackward, gradients: Gradients, blocks: int) -> Tensor | None:
    """Returns a number for each sequence, tile of queries and head, to be summed; None where nobody wants the sums.

    They are 0: tiles behind a packed sequence's end write nothing.
    """
    if gradients.sinks is None:
        return None
    attention = call.attention
    return tape.zeros((attention.sequences * blocks, attention.heads), torch.float32, call.query.device)


def sum_partials(partials: Tensor | None, gradients: Gradients) -> None:
    """Fills the sinks' gradient [heads] with the sums of what tiles of queries left, [tiles, heads], rounded once."""
    dsinks = gradients.sinks
    if partials is None or dsinks is None:
        return
    if dsinks.dtype == partials.dtype:
        torch.sum(partials, 0, out=dsinks)
    else:
        dsinks.copy_(partials.sum(0))


@triton.jit
def rows_of(sequence, head, query_first, heads, query_size, row_kind, cu_seq_q):
    """Returns where a head's queries begin among statistics, [B, Hq, Sq] or packed [Hq, Nq]; all are int64."""
    if cu_seq_q is None:
        place = (sequence * heads + head) * query_size
    else:
        place = head * (row_kind // heads) + query_first
    return place


@triton.jit
def load_statistics(statistics, row_kind, inside):
    """Loads (top, log2 of the sum) of rows at these addresses.

    top is inf, with which weights are 0, where not `inside` and for queries without keys. None as `inside` loads all.
    """
    top = tl.load(statistics, mask=inside, other=None if inside is None else float("inf"))
    log_sum = tl.load(statistics + row_kind, mask=inside, other=None if inside is None else 0.0)
    return tl.where(top == float("-inf"), float("inf"), top), log_sum


@triton.jit
def store_statistics(statistics, row_kind, top, log_sum, inside):
    """Stores what load_statistics reads."""
    tl.store(statistics, top, mask=inside)
    tl.store(statistics + row_kind, log_sum, mask=inside)
