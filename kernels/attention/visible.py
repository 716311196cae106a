"""The keys that a query sees: sequences, their windows, and their masks as bits.

With position(i) = i + query_start, query i of a sequence may attend to key j where, for each of the rules given,

    j < key_length      position(i) - left <= j      j <= position(i) + right      its bit of the mask is set

(causality is right = 0). An absent tensor or side of the window is None and costs nothing. Rows are queries, columns
are keys; tiles are [rows, columns] or, with keys as rows, [columns, rows].
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tfm.operators import attention as operators

FAR = tl.constexpr(operators.FAR)


class Lengths(NamedTuple):
    """The ends of sequences, and the positions of their first queries; as in Attention."""

    cu_seq_q: Tensor | None
    cu_seq_k: Tensor | None
    key_lengths: Tensor | None
    starts: Tensor | None


class Window(NamedTuple):
    """The numbers of keys that a query sees before and after its position; None for all."""

    left: int | None
    right: int | None

    @classmethod
    def closed(cls, left: int | None, right: int | None) -> Window:
        """Returns a window whose open sides are FAR, for kernels that are compiled alike for both."""
        return cls(operators.FAR if left is None else left, operators.FAR if right is None else right)


class Mask(NamedTuple):
    """A mask as bits, as in Attention, dense; the rest is 1 for dimensions that it has, 0 where it is broadcast.

    Strides would be as many numbers that vary, or a kernel compiled anew for those that are multiples of 16. `keys` is
    the mask of the keys, bool [B, Sk], which every query obeys besides.
    """

    words: Tensor | None
    word_sequences: int
    word_heads: int
    reach: Tensor | None
    reach_sequences: int
    reach_heads: int
    keys: Tensor | None

    @classmethod
    def of(cls, words: Tensor | None, reach: Tensor | None, keys: Tensor | None, max_q: int) -> Mask:
        """Returns these bits, copied where they are not dense or have one row of words for all queries."""
        if words is None:
            word_dims = 0, 0
        else:
            word_dims = int(words.shape[0] > 1), int(words.shape[1] > 1)
            words = (words if words.shape[2] == max_q else words.expand(-1, -1, max_q, -1)).contiguous()
        if reach is None:
            return cls(words, *word_dims, None, 0, 0, keys)
        return cls(words, *word_dims, reach.contiguous(), int(reach.shape[0] > 1), int(reach.shape[1] > 1), keys)


@triton.jit
def locate(sequence, cu_seq, lengths, size):
    """Returns (first row, int64; length, int32) of a sequence, packed at `cu_seq` or padded to `size` and cut."""
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
    """Returns the position of a sequence's first query among its keys, int32."""
    position = tl.cast(start, tl.int32)
    if starts is not None:
        position = tl.minimum(tl.maximum(tl.load(starts + sequence), -FAR), FAR).to(tl.int32)
    return position


@triton.jit
def visible(first, last, offset, before, after, length):
    """Returns the range [begin, end) of 0..length that some of first..last sees, begin <= end.

    i sees i + offset and so many `before` and `after` it.

    Of queries, their keys: offset is the position, `before` left, `after` right. Of keys, the queries that see them:
    offset is -position, `before` right, `after` left.
    """
    begin, end = tl.cast(0, tl.int32), length
    if before is not None:
        begin = tl.maximum(first + offset - before, 0)
    if after is not None:
        end = tl.minimum(last + offset + after + 1, length)
    return begin, tl.maximum(begin, end)


@triton.jit
def visible_tiles(first, last, offset, before, after, length, BLOCK: tl.constexpr):
    """Returns `visible` and its tiles of BLOCK: (begin, end, first tile, whole_first, whole_last, last tile).

    Tiles whole_first..whole_last lie whole in what each of first..last sees, and take no mask.
    """
    begin, end = visible(first, last, offset, before, after, length)
    common_begin, common_end = tl.cast(0, tl.int32), length
    if before is not None:
        common_begin = tl.maximum(last + offset - before, 0)
    if after is not None:
        common_end = tl.minimum(first + offset + after + 1, length)
    first_tile, last_tile = begin // BLOCK, tl.cdiv(end, BLOCK)
    last_tile = tl.where(begin < end, last_tile, first_tile)
    whole_first = tl.minimum(tl.maximum(tl.cdiv(common_begin, BLOCK), first_tile), last_tile)
    whole_last = tl.minimum(tl.maximum(tl.maximum(common_end, 0) // BLOCK, whole_first), last_tile)
    return begin, end, first_tile, whole_first, whole_last, last_tile


@triton.jit
def valid_span(mask, sequence, key_size, length):
    """Returns the range of a sequence's `length` keys outside which the mask of the keys has none, begin <= end."""
    BLOCK: tl.constexpr = 1024
    begin, end = length, tl.cast(0, tl.int32)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_valid = tl.load(mask.keys + sequence * key_size + column, mask=column < length, other=0) != 0
        begin = tl.minimum(begin, tl.min(tl.where(is_valid, column, length), axis=0))
        end = tl.maximum(end, tl.max(tl.where(is_valid, column + 1, 0), axis=0))
    return tl.minimum(begin, end), end


@triton.jit
def edge_tile(step, first, whole_first, whole_last):
    """Returns the step-th tile that needs a mask: those before whole_first, then those from whole_last on."""
    tile = first + step
    return tl.where(tile < whole_first, tile, tile + (whole_last - whole_first))


@triton.jit
def share_of(split, first, whole_first, whole_last, last, TILES: tl.constexpr):
    """Returns (first, whole_first, whole_last, last) of the split-th TILES of the tiles first..last."""
    first = tl.minimum(first + split * TILES, last)
    last = tl.minimum(first + TILES, last)
    whole_first = tl.minimum(tl.maximum(whole_first, first), last)
    return first, whole_first, tl.minimum(tl.maximum(whole_last, whole_first), last), last


@triton.jit
def octets(words):
    """Returns the words of a mask's row as a multiple of 8, which the compiler cannot tell of a number that varies."""
    return words // 8 * 8


@triton.jit
def mask_head(sequence, head, heads, has_sequences, has_heads):
    """Returns the place of a (sequence, head) among those of a mask."""
    return sequence * has_sequences * (1 + (heads - 1) * has_heads) + head * has_heads


@triton.jit
def reached(mask, sequence, head, heads, column, inside, row_words, key_size):
    """Tells which columns some query of a (sequence, head) reaches: int1, 0 where not `inside`."""
    if mask.keys is not None:
        inside = tl.load(mask.keys + sequence * key_size + column, mask=inside, other=0) != 0
    if mask.reach is not None:
        place = mask_head(sequence, head, heads, mask.reach_sequences, mask.reach_heads)
        word = tl.load(mask.reach + place * octets(row_words) + column // 32, mask=inside, other=0)
        inside = ((word >> (column % 32)) & 1) != 0
    return inside


@triton.jit
def word_rows(mask, sequence, head, heads, query_size, row_words):
    """Returns a pointer to the mask words of one (sequence, head), both int64; None where there are none."""
    rows = None
    if mask.words is not None:
        place = mask_head(sequence, head, heads, mask.word_sequences, mask.word_heads)
        rows = mask.words + place * query_size * octets(row_words)
    return rows


@triton.jit
def mask_tile(words, row, is_row, first_column, row_words, BLOCK_COLUMNS: tl.constexpr):
    """Loads a tile of a mask from its words: int1 [R, BLOCK_COLUMNS], for `row` and `is_row` [R].

    `first_column` is a multiple of BLOCK_COLUMNS; word rows are long enough for whole tiles.
    """
    WORDS: tl.constexpr = max(BLOCK_COLUMNS // 32, 1)
    word = first_column // 32 + tl.arange(0, WORDS)
    address = words + row.to(tl.int64)[:, None] * octets(row_words) + word[None, :]
    bits = tl.load(address, mask=is_row[:, None], other=0)
    bit = first_column % 32 + tl.arange(0, BLOCK_COLUMNS // WORDS)
    tile = (bits[:, :, None] >> bit[None, None, :]) & 1
    return tl.reshape(tile != 0, [row.shape[0], BLOCK_COLUMNS])


@triton.jit
def allowed_tile(
    inside, row, column, is_row, position, window, words, first_column, row_words, BLOCK_COLUMNS: tl.constexpr,
    KEYS_ARE_ROWS: tl.constexpr,
):  # fmt: skip
    """Tells which queries may attend to which of the keys that are `inside` [C], by the window and the mask's words.

    int1 [R, C], or [C, R] where KEYS_ARE_ROWS; one row, or column, stands for all where neither rule is given.
    """
    if KEYS_ARE_ROWS:
        allowed, row_of, column_of = inside[:, None], row[None, :], column[:, None]
    else:
        allowed, row_of, column_of = inside[None, :], row[:, None], column[None, :]
    if window.left is not None:
        allowed = allowed & (column_of >= row_of + position - window.left)
    if window.right is not None:
        allowed = allowed & (column_of <= row_of + position + window.right)
    if words is not None:
        tile = mask_tile(words, row, is_row, first_column, row_words, BLOCK_COLUMNS)
        allowed = allowed & (tl.trans(tile) if KEYS_ARE_ROWS else tile)
    return allowed
