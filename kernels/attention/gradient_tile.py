"""One tile of the gradient of scores, for the gradients of what is added to many scores.

With the weights p, rebuilt from the two numbers that the forward left of each row, dp = dropout(dout vᵀ) and the delta
of the attention's backward,

    ds = p · (dp - delta)

without the slope of a softcap, which lies before what is added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tfm.kernels.attention.heads import head_of, products_of
from tfm.kernels.attention.scores import add_bias, bend, load_statistics, relative_tile, rows_of, unit_of
from tfm.kernels.attention.visible import allowed_tile, first_position, locate, reached, visible, word_rows
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import exponent


@triton.jit
def gradient_tile(
    q, k, v, dout, statistics, delta, mask, lengths, window, score, dropout, added,
    sequence, head, first_row, first_column,
    heads, group, query_size, key_size, row_words, row_kind, start, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Computes ds of a (sequence, head), both int64, from a row, which may be negative, and a tile's first column on.

    fp32 of the shape of TILE; 0 where a query may not attend. `added` is the tile of a bias; None where there is none.
    """
    query_first, query_length = locate(sequence, lengths.cu_seq_q, None, query_size)
    key_first, key_length = locate(sequence, lengths.cu_seq_k, lengths.key_lengths, key_size)
    position = first_position(sequence, lengths.starts, start)
    row, column = first_row + tl.arange(0, TILE[0]), first_column + tl.arange(0, TILE[1])
    is_row = (row >= 0) & (row < query_length)
    begin, end = visible(0, query_length - 1, position, window.left, window.right, key_length)
    inside = (column >= begin) & (column < end)
    if mask.reach is not None or mask.keys is not None:
        inside &= reached(mask, sequence, head, heads, column, inside, row_words, key_size)

    key_head = head // group
    q_head, k_head = head_of(q, sequence, head, query_first), head_of(k, sequence, key_head, key_first)
    products = products_of(q_head, q, row, is_row, k_head, k, column, inside, DIMS, PRECISION)
    dout_head, v_head = head_of(dout, sequence, head, query_first), head_of(v, sequence, key_head, key_first)
    d_weights = products_of(dout_head, dout, row, is_row, v_head, v, column, inside, VALUE_DIMS, PRECISION)

    of_row = rows_of(sequence, head, query_first, heads, query_size, row_kind, lengths.cu_seq_q) + row
    top, log_sum = load_statistics(statistics + of_row, row_kind, is_row)
    difference = tl.load(delta + of_row, mask=is_row, other=0.0)
    x, _ = bend(products, score)
    if score.relative_bias is not None:
        known = is_row[:, None] & inside[None, :]
        relative = relative_tile(score, head, row[:, None], column[None, :], position, known)
        added = relative if added is None else added + relative
    scores = add_bias(x, unit_of(score), added)
    words = word_rows(mask, sequence, head, heads, query_size, row_words)
    allowed = allowed_tile(
        inside, row, column, is_row, position, window, words, first_column, row_words, TILE[1], KEYS_ARE_ROWS=False
    )
    most = tl.where(allowed, 0.0, float("-inf"))
    weights = tl.exp2(exponent(scores, 1.0, top[:, None], log_sum[:, None], most, IS_FORMED=True))
    if dropout.seed is not None:
        group_of = sequence * heads + head
        keep = keep_mask(row[:, None], first_column, group_of, site, dropout.seed, dropout.threshold, TILE[1])
        d_weights = tl.where(keep, d_weights * tl.cast(dropout.keep_scale, tl.float32), 0.0)
    return weights * (d_weights - difference[:, None])
