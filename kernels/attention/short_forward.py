"""Attention over at most a few hundred keys, forward: all keys and values of a head on chip, softmax in one piece.

With all scores s of a query in registers (s as tfm.kernels.attention.scores states it) nothing is rescaled on the way:

    top = max(s)      p = exp(s - top)      out = dropout(p) v / Σ p

A sink is one more score, of a key without a value. A query without keys gives 0, and -inf for its top.

Read: q, k and v once, a bit for each element of a dense mask. Written: out, top and log2 Σ p. One launch. At the
lengths of sentences it is the latency of one round of loads, two products and a store that counts, not arithmetic: a
program is as small as a tensor core's tile allows (16 queries, one warp), so that a dozen heads lie on each
multiprocessor at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import VARYING, common_arguments
from tfm.kernels.attention.heads import head_of, heads_of, load_rows, store_rows
from tfm.kernels.attention.scores import finish_rows, rows_of, scores_of, store_statistics, unit_of
from tfm.kernels.attention.visible import allowed_tile, first_position, locate, reached, visible, word_rows
from tfm.kernels.launch.attention import short as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import binary, power
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention


@triton.jit(do_not_specialize=[*VARYING, "splits"])
def short_attention_forward_kernel(
    q, k, v, bias, out, statistics, mask, lengths, window, score, dropout,
    heads, group, query_size, key_size, row_words, row_kind, splits, start, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`splits` programs share the tiles of BLOCK_QUERIES queries of one (sequence, head)."""
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    program = tl.program_id(0)
    sequence, head = (program // splits // heads).to(tl.int64), program // splits % heads
    query_first, query_length = locate(sequence, lengths.cu_seq_q, None, query_size)
    first_row = program % splits * BLOCK_QUERIES
    if first_row >= query_length:
        return
    key_first, key_length = locate(sequence, lengths.cu_seq_k, lengths.key_lengths, key_size)
    position = first_position(sequence, lengths.starts, start)
    wide_head, key_head = head.to(tl.int64), (head // group).to(tl.int64)
    q_head = head_of(q, sequence, wide_head, query_first)
    out_head = head_of(out, sequence, wide_head, query_first)
    statistics += rows_of(sequence, wide_head, query_first, heads, query_size, row_kind, lengths.cu_seq_q)
    words = word_rows(mask, sequence, wide_head, heads, query_size, row_words)
    IS_BIASED: tl.constexpr = bias is not None or score.relative_bias is not None
    unit = unit_of(score)
    # Of a negative scale the smallest product has the largest score.
    sign = tl.where(unit < 0, -1.0, 1.0)
    scale = 1.0
    if not IS_BIASED:
        unit = tl.abs(unit)
        scale = binary(unit)

    column = tl.arange(0, BLOCK_KEYS)
    begin, end = visible(0, query_length - 1, position, window.left, window.right, key_length)
    inside = (column >= begin) & (column < end)
    if mask.reach is not None or mask.keys is not None:
        inside &= reached(mask, sequence, wide_head, heads, column, inside, row_words, key_size)
    key = load_rows(head_of(k, sequence, key_head, key_first), k, column, inside, DIMS, 0)
    value = load_rows(head_of(v, sequence, key_head, key_first), v, column, inside, VALUE_DIMS, 0)

    for tile_row in tl.range(first_row, query_length, splits * BLOCK_QUERIES, num_stages=1):
        row = tile_row + tl.arange(0, BLOCK_QUERIES)
        is_row = row < query_length
        query = load_rows(q_head, q, row, is_row, DIMS, 0)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if not IS_BIASED and score.outer is None:
            products *= sign
        scores, _ = scores_of(
            products, score, unit, bias, sequence, wide_head, row[:, None], column[None, :], position,
            is_row[:, None] & (column < key_length)[None, :],
        )  # fmt: skip
        allowed = allowed_tile(
            inside, row, column, is_row, position, window, words, 0, row_words, BLOCK_KEYS, KEYS_ARE_ROWS=False
        )
        scores = tl.where(allowed, scores, float("-inf"))

        top = tl.max(scores, axis=1) * scale
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = power(scores, top[:, None], scale, IS_BIASED)
        total = tl.sum(weights, axis=1)
        _, top, log_sum, norm = finish_rows(top, total, unit, score, head, dropout.keep_scale, IS_BIASED)
        store_statistics(statistics + row, row_kind, top, log_sum, is_row)
        if dropout.seed is not None:
            keep = keep_mask(
                row[:, None], 0, sequence * heads + head, site, dropout.seed, dropout.threshold, BLOCK_KEYS
            )
            weights = tl.where(keep, weights, 0.0)
        acc = tl.dot(weights.to(v.data.dtype.element_ty), value, input_precision=PRECISION)
        store_rows(out_head, out, acc * norm[:, None], row, is_row, VALUE_DIMS, 0)


def short_attention_forward(
    tape: Tape, call: Attention, tiles: launch.ShortForwardTiles, output: Tensor, statistics: Tensor
) -> None:
    """Fills the results of `call` at these tiles, those that the launch settings have for it. One launch."""
    splits = tiles.splits(call.max_q)
    tape.launch(
        short_attention_forward_kernel, (splits * call.sequences * call.heads,), tiles.options,
        **common_arguments(short_attention_forward_kernel, call, whole=True, with_sink=True),
        out=heads_of(output), statistics=statistics, splits=splits, TILE=(tiles.block_queries, tiles.block_keys),
    )  # fmt: skip
