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

from tfm.kernels.attention.arguments import VARYING, common_arguments, heads_of
from tfm.kernels.attention.scores import (
    add_bias,
    bend,
    column_bits,
    first_number,
    first_position,
    is_allowed,
    load_rows,
    locate,
    mask_tile,
    store_rows,
    unit_of,
    visible_keys,
    words_of,
)
from tfm.kernels.launch.attention import short as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import LOG2E, binary, natural_top, power
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention


@triton.jit(do_not_specialize=[*VARYING, "splits"])
def short_attention_forward_kernel(
    q, k, v, bias, out, words, reach, sinks, seed, lengths, statistics,
    words_b, words_h, words_s, reach_b, reach_h, row_kind, row_h,
    heads, group, query_size, key_size, splits, start, left, right, score, threshold, keep_scale, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`splits` programs share the tiles of BLOCK_QUERIES queries of one (sequence, head)."""
    DIM: tl.constexpr = DIMS[0]
    BLOCK_DIM: tl.constexpr = DIMS[1]
    VALUE_DIM: tl.constexpr = VALUE_DIMS[0]
    BLOCK_VALUE_DIM: tl.constexpr = VALUE_DIMS[1]
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
    q_head = q.data + sequence * q.b + wide_head * q.h + query_first * q.s
    k_head = k.data + sequence * k.b + key_head * k.h + key_first * k.s
    v_head = v.data + sequence * v.b + key_head * v.h + key_first * v.s
    out_head = out.data + sequence * out.b + wide_head * out.h + query_first * out.s
    statistics += first_number(sequence, wide_head, query_first, heads, row_h, lengths.cu_seq_q)
    IS_BIASED: tl.constexpr = bias is not None
    unit = unit_of(score)
    # Of a negative scale the smallest product has the largest score.
    sign = tl.where(unit < 0, -1.0, 1.0)
    scale = 1.0
    if not IS_BIASED:
        unit = tl.abs(unit)
        scale = binary(unit)

    column = tl.arange(0, BLOCK_KEYS)
    begin, end = visible_keys(0, query_length - 1, position, left, right, key_length)
    inside = (column >= begin) & (column < end)
    if reach is not None:
        inside &= column_bits(reach + sequence * reach_b + wide_head * reach_h, column, inside)
    key = load_rows(k_head, k, column, inside, DIM, 0, BLOCK_DIM)
    value = load_rows(v_head, v, column, inside, VALUE_DIM, 0, BLOCK_VALUE_DIM)

    for tile_row in tl.range(first_row, query_length, splits * BLOCK_QUERIES, num_stages=1):
        row = tile_row + tl.arange(0, BLOCK_QUERIES)
        is_row = row < query_length
        query = load_rows(q_head, q, row, is_row, DIM, 0, BLOCK_DIM)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores, _ = bend(products, score)
        if not IS_BIASED and score.outer is None:
            scores *= sign
        if bias is not None:
            bias_tile = bias.data + sequence * bias.b + wide_head * bias.h
            address = bias_tile + row.to(tl.int64)[:, None] * bias.s + column.to(tl.int64)[None, :] * bias.d
            scores = add_bias(scores, unit, address, is_row[:, None] & (column < key_length)[None, :])
        allowed = inside[None, :]
        if left is not None or right is not None:
            allowed &= is_allowed(row[:, None], column[None, :], position, left, right, key_length)
        if words is not None:
            head_words = words_of(words, sequence, wide_head, words_b, words_h)
            allowed &= mask_tile(head_words, row, words_s, is_row, 0, BLOCK_KEYS)
        scores = tl.where(allowed, scores, float("-inf"))

        top = tl.max(scores, axis=1) * scale
        is_empty = top == float("-inf")
        top = tl.where(is_empty, 0.0, top)
        weights = power(scores, top[:, None], scale, IS_BIASED)
        total = tl.sum(weights, axis=1)
        top, excess = natural_top(top, unit, IS_BIASED)
        norm = tl.full([BLOCK_QUERIES], 1.0, tl.float32)
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32)
            higher = tl.maximum(top, sink)
            norm = tl.exp2((top - higher) * LOG2E + excess)
            total = total * norm + tl.exp2((sink - higher) * LOG2E)
            top, excess = higher, tl.zeros_like(excess)
        total = tl.where(is_empty, 1.0, total)
        tl.store(statistics + row, tl.where(is_empty, float("-inf"), top), mask=is_row)
        tl.store(statistics + row_kind + row, tl.where(is_empty, 0.0, tl.log2(total) + excess), mask=is_row)
        norm *= tl.cast(keep_scale, tl.float32) / total
        if seed is not None:
            keep = keep_mask(row[:, None], 0, sequence * heads + head, site, seed, threshold, BLOCK_KEYS)
            weights = tl.where(keep, weights, 0.0)
        acc = tl.dot(weights.to(v.data.dtype.element_ty), value, input_precision=PRECISION)
        acc *= norm[:, None]
        store_rows(out_head, out, acc, row, is_row, VALUE_DIM, 0, BLOCK_VALUE_DIM)


def short_attention_forward(
    tape: Tape, call: Attention, tiles: launch.ShortForwardTiles, output: Tensor, statistics: Tensor
) -> None:
    """Fills the results of `call` at these tiles, those that the launch settings have for it. One launch."""
    splits = tiles.splits(call.max_q)
    tape.launch(
        short_attention_forward_kernel, (splits * call.sequences * call.heads,), tiles.options,
        **common_arguments(short_attention_forward_kernel, call, whole=True), sinks=call.sinks, out=heads_of(output),
        statistics=statistics, splits=splits, TILE=(tiles.block_queries, tiles.block_keys),
    )  # fmt: skip
