"""What the attention kernels share: where a sequence lies, which keys a tile of queries sees, and what a score is.

With position(i) = i + query_start, query i of a sequence may attend to key j where, for each of the rules given,

    j < key_length      position(i) - left <= j      j <= position(i) + right      its bit of the mask is set

(causality is right = 0). Its score is

    s = unit · x + bias        x = q·k, unit = scale      or      x = tanh(scale / softcap · q·k), unit = softcap

and the derivative of scores by q·k is scale · slope, slope = 1 or 1 - tanh². With a bias, scores themselves are formed,
rounded once more, as torch has them; without one, x. tfm.kernels.softmax makes weights of either.

An absent tensor, window or softcap is None and costs nothing. Rows are queries, columns are keys; functions that take
`row` and `column` take them in any shapes that broadcast, so that a tile may have its keys as rows, too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import tanh
from tfm.kernels.softmax import fma
from tfm.operators import attention as operators

FAR = tl.constexpr(operators.FAR)


class Score(NamedTuple):
    """The factors of a score.

    Attributes:
        inner: of q·k.
        outer: of its tanh; None where uncapped.
        scale: their product.
    """

    inner: float
    outer: float | None
    scale: float

    @classmethod
    def of(cls, scale: float, softcap: float | None) -> Score:
        """Returns those of scores that are scaled and, where there is a softcap, capped."""
        return cls(scale, None, scale) if softcap is None else cls(scale / softcap, softcap, scale)


def as_numbers(left: int | None, right: int | None) -> tuple[int, int]:
    """A window whose open sides are FAR, for kernels that one compilation shall serve whatever the window."""
    return operators.FAR if left is None else left, operators.FAR if right is None else right


def sum_sinks(partials: Tensor, dsinks: Tensor) -> None:
    """Fills dsinks [heads] with the sums of what each tile of queries left, [tiles, heads], rounded once."""
    if dsinks.dtype == partials.dtype:
        torch.sum(partials, 0, out=dsinks)
    else:
        dsinks.copy_(partials.sum(0))


@triton.jit
def locate(sequence, cu_seq, lengths, size):
    """(first row, int64; length, int32) of a sequence: packed at `cu_seq`, or padded to `size` and cut at `lengths`."""
    if cu_seq is not None:
        first = tl.load(cu_seq + sequence).to(tl.int64)
        length = (tl.load(cu_seq + sequence + 1) - first).to(tl.int32)
    else:
        first, length = tl.cast(0, tl.int64), tl.cast(size, tl.int32)
        if lengths is not None:
            length = tl.minimum(tl.maximum(tl.load(lengths + sequence), 0), length).to(tl.int32)
    return first, length


@triton.jit
def first_position(sequence, starts, start):
    """The position among the keys of a sequence's first query, int32."""
    position = tl.cast(start, tl.int32)
    if starts is not None:
        position = tl.minimum(tl.maximum(tl.load(starts + sequence), -FAR), FAR).to(tl.int32)
    return position


@triton.jit
def visible_keys(first_row, last_row, start, left, right, key_length):
    """The keys [begin, end) that some query of first_row..last_row sees by length and window, begin <= end."""
    begin, end = tl.cast(0, tl.int32), key_length
    if left is not None:
        begin = tl.maximum(first_row + start - left, 0)
    if right is not None:
        end = tl.minimum(last_row + start + right + 1, key_length)
    return begin, tl.maximum(begin, end)


@triton.jit
def common_keys(first_row, last_row, start, left, right, key_length):
    """The keys [begin, end) that each of those queries sees; begin may lie behind end."""
    begin, end = tl.cast(0, tl.int32), key_length
    if left is not None:
        begin = tl.maximum(last_row + start - left, 0)
    if right is not None:
        end = tl.minimum(first_row + start + right + 1, key_length)
    return begin, tl.maximum(end, 0)


@triton.jit
def visible_queries(first_key, last_key, start, left, right, query_length):
    """The queries [begin, end) that see some key of first_key..last_key by the window, begin <= end."""
    begin, end = tl.cast(0, tl.int32), query_length
    if right is not None:
        begin = tl.maximum(first_key - right - start, 0)
    if left is not None:
        end = tl.minimum(last_key + left - start + 1, query_length)
    return begin, tl.maximum(begin, end)


@triton.jit
def common_queries(first_key, last_key, start, left, right, query_length):
    """The queries [begin, end) that see each of those keys; begin may lie behind end."""
    begin, end = tl.cast(0, tl.int32), query_length
    if right is not None:
        begin = tl.maximum(last_key - right - start, 0)
    if left is not None:
        end = tl.minimum(first_key + left - start + 1, query_length)
    return begin, tl.maximum(end, 0)


@triton.jit
def split_tiles(begin, end, common_begin, common_end, BLOCK: tl.constexpr):
    """Tiles of BLOCK that meet [begin, end), and among them those that lie whole in [common_begin, common_end).

    Returns (first, whole_first, whole_last, last): tiles first..last, of which whole_first..whole_last take no mask.
    """
    first, last = begin // BLOCK, tl.cdiv(end, BLOCK)
    last = tl.where(begin < end, last, first)
    whole_first = tl.minimum(tl.maximum(tl.cdiv(common_begin, BLOCK), first), last)
    whole_last = tl.minimum(tl.maximum(common_end // BLOCK, whole_first), last)
    return first, whole_first, whole_last, last


@triton.jit
def edge_tile(step, first, whole_first, whole_last):
    """The step-th of the tiles that need a mask: those before whole_first, then those from whole_last on."""
    tile = first + step
    return tl.where(tile < whole_first, tile, tile + (whole_last - whole_first))


@triton.jit
def is_allowed(row, column, start, left, right, key_length):
    """Which keys the length and the window leave to which queries; without a window in the shape of `column` alone."""
    allowed = column < key_length
    if left is not None:
        allowed = allowed & (column >= row + start - left)
    if right is not None:
        allowed = allowed & (column <= row + start + right)
    return allowed


@triton.jit
def column_bits(words, column, inside):
    """Bits of one row of mask words at these columns: int1 in the shape of `column`, 0 where not `inside`."""
    word = tl.load(words + column // 32, mask=inside, other=0)
    return ((word >> (column % 32)) & 1) != 0


@triton.jit
def octets(step):
    """A stride of mask words as the compiler cannot know it of a number that varies: a multiple of 8."""
    return step // 8 * 8


@triton.jit
def words_of(words, sequence, head, sequence_step, head_step):
    """Where the mask words of one (sequence, head), both int64, begin."""
    return words + sequence * octets(sequence_step) + head * octets(head_step)


@triton.jit
def mask_tile(words, row, row_stride, inside, first_column, BLOCK_COLUMNS: tl.constexpr):
    """A tile of the mask from its bits: int1 [R, BLOCK_COLUMNS], for `row` and `inside` [R].

    `first_column` is a multiple of BLOCK_COLUMNS; word rows are long enough for whole tiles.
    """
    WORDS: tl.constexpr = max(BLOCK_COLUMNS // 32, 1)
    word = first_column // 32 + tl.arange(0, WORDS)
    address = words + row.to(tl.int64)[:, None] * octets(row_stride) + word[None, :]
    bits = tl.load(address, mask=inside[:, None], other=0)
    bit = first_column % 32 + tl.arange(0, BLOCK_COLUMNS // WORDS)
    tile = (bits[:, :, None] >> bit[None, None, :]) & 1
    return tl.reshape(tile != 0, [row.shape[0], BLOCK_COLUMNS])


@triton.jit
def bend(products, score):
    """(x, slope) of the products q·k of a tile; slope is 1.0 uncapped."""
    x, slope = products, 1.0
    if score.outer is not None:
        x = tanh(products * tl.cast(score.inner, tl.float32))
        slope = 1.0 - x * x
    return x, slope


@triton.jit
def unit_of(score):
    """The unit of x: scale or softcap."""
    return tl.cast(score.inner if score.outer is None else score.outer, tl.float32)


@triton.jit
def add_bias(x, unit, address, inside):
    """The scores of a tile of x with a bias: -inf stays -inf, whatever x is there; 0 is added where not `inside`."""
    return biased(x, unit, tl.load(address, mask=inside, other=0.0))


@triton.jit
def biased(x, unit, bias):
    """As add_bias, of a tile of the bias."""
    bias = bias.to(tl.float32)
    return tl.where(bias == float("-inf"), float("-inf"), fma(x, unit, bias))


@triton.jit
def first_number(sequence, head, query_first, heads, row_h, cu_seq_q):
    """Where the numbers of a head's queries begin among statistics, [B, Hq, Sq] or packed [Hq, Nq]; all are int64."""
    if cu_seq_q is None:
        place = (sequence * heads + head) * row_h
    else:
        place = head * row_h + query_first
    return place


@triton.jit
def load_statistics(statistics, kind_step, inside):
    """(top, log2 of the sum) of rows at these addresses; top is inf, of which weights are 0, where not `inside` and for
    queries without keys. None as `inside` loads all."""
    top = tl.load(statistics, mask=inside, other=None if inside is None else float("inf"))
    log_sum = tl.load(statistics + kind_step, mask=inside, other=None if inside is None else 0.0)
    return tl.where(top == float("-inf"), float("inf"), top), log_sum


@triton.jit
def load_rows(head, x, row, inside, COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Columns FIRST to FIRST + BLOCK of these rows [R] of a head of `x`, of COLUMNS columns, 0 beyond: [R, BLOCK].

    `head` is where it begins. `inside` [R] says which rows are read, the others are 0; None reads all, without a mask.
    """
    column = FIRST + tl.arange(0, BLOCK)
    address = head + row.to(tl.int64)[:, None] * x.s + column[None, :] * x.d
    mask = None
    if inside is not None:
        mask = inside[:, None]
    if FIRST + BLOCK > COLUMNS:
        is_column = (column < COLUMNS)[None, :]
        mask = is_column if mask is None else mask & is_column
    return tl.load(address, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(head, x, value, row, inside, COLUMNS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of load_rows: `value` [R, BLOCK] to those columns of the rows [R] that are `inside`."""
    column = FIRST + tl.arange(0, BLOCK)
    address = head + row.to(tl.int64)[:, None] * x.s + column[None, :] * x.d
    tl.store(address, value, mask=inside[:, None] & (column < COLUMNS)[None, :])
