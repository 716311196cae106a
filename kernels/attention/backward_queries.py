"""Attention of any length, backward, first pass: delta, the gradient of the queries, and that of the sinks.

With the weights p, rebuilt from the two numbers that the forward left of each row, and their gradients
dp = dropout(dout vᵀ),

    delta = Σ dout · out - dlse       ds = p · (dp - delta)
    dq = scale · (ds · slope) k       dsink = -Σ p_sink · delta

(Dao et al., "FlashAttention", 2022, appendix B.4; `dlse` is the gradient of lse, where someone uses it.) Rows of delta
are written for the second pass, tfm.kernels.attention.backward_keys: two passes form seven products where one pass with
atomic sums into dq forms five, and give the same bits on every run.

Of 16-bit inputs without a bias, a tile of queries whose tops are all small (LARGE in tfm.kernels.softmax) rebuilds its
weights by one fma from lse = top · log2(e) + log2 Σ, as rounded, which is written for the second pass likewise. One
branch a tile tells the two; under a small softcap all tops are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import (
    VARYING,
    common_arguments,
    dense_statistics,
    dlse_strides,
    heads_of,
    problem,
)
from tfm.kernels.attention.scores import (
    add_bias,
    bend,
    column_bits,
    common_keys,
    edge_tile,
    first_number,
    first_position,
    is_allowed,
    load_rows,
    load_statistics,
    locate,
    mask_tile,
    split_tiles,
    store_rows,
    sum_sinks,
    unit_of,
    visible_keys,
    words_of,
)
from tfm.kernels.launch.attention import any_length as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import LARGE, LOG2E, exponent, fma, fms
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention, AttentionBackward, row_statistics


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def attention_backward_queries_kernel(
    q, k, v, bias, out, dout, dq, words, reach, sinks, seed, lengths, statistics, dlse, delta, sink_partials,
    words_b, words_h, words_s, reach_b, reach_h, dlse_b, dlse_h, dlse_s, row_kind, row_h,
    heads, group, query_size, key_size, tiles, start, left, right, score, threshold, keep_scale, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, ARE_LARGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program has BLOCK_QUERIES queries of one (sequence, head), and goes over the keys that they see."""
    DIM: tl.constexpr = DIMS[0]
    DIM_FIRST: tl.constexpr = DIMS[1]
    DIM_REST: tl.constexpr = DIMS[2]
    VALUE_DIM: tl.constexpr = VALUE_DIMS[0]
    VALUE_FIRST: tl.constexpr = VALUE_DIMS[1]
    VALUE_REST: tl.constexpr = VALUE_DIMS[2]
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    program = tl.program_id(0)
    sequence, head = (program // tiles // heads).to(tl.int64), program // tiles % heads
    query_first, query_length = locate(sequence, lengths.cu_seq_q, None, query_size)
    key_first, key_length = locate(sequence, lengths.cu_seq_k, lengths.key_lengths, key_size)
    query_tile = tiles - 1 - program % tiles
    first_row = query_tile * BLOCK_QUERIES
    if first_row >= query_length:
        return
    last_row = tl.minimum(first_row + BLOCK_QUERIES, query_length) - 1
    row = first_row + tl.arange(0, BLOCK_QUERIES)
    is_row = row < query_length
    wide_head = head.to(tl.int64)

    out_head = out.data + sequence * out.b + wide_head * out.h + query_first * out.s
    dout_head = dout.data + sequence * dout.b + wide_head * dout.h + query_first * dout.s
    d_out = load_rows(dout_head, dout, row, is_row, VALUE_DIM, 0, VALUE_FIRST)
    output = load_rows(out_head, out, row, is_row, VALUE_DIM, 0, VALUE_FIRST)
    difference = tl.sum(d_out.to(tl.float32) * output.to(tl.float32), axis=1)
    if VALUE_REST > 0:
        d_out_rest = load_rows(dout_head, dout, row, is_row, VALUE_DIM, VALUE_FIRST, VALUE_REST)
        output = load_rows(out_head, out, row, is_row, VALUE_DIM, VALUE_FIRST, VALUE_REST)
        difference += tl.sum(d_out_rest.to(tl.float32) * output.to(tl.float32), axis=1)
    if dlse is not None:
        dlse += sequence * dlse_b + wide_head * dlse_h + (query_first + row) * dlse_s
        difference -= tl.load(dlse, mask=is_row, other=0.0)
    place = first_number(sequence, wide_head, query_first, heads, row_h, lengths.cu_seq_q) + row
    tl.store(delta + place, difference, mask=is_row)
    top, log_sum = load_statistics(statistics + place, row_kind, is_row)
    has_keys = top < float("inf")
    if sink_partials is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        share = tl.exp2(exponent(sink, 1.0, top, log_sum, 0.0, IS_FORMED=True))
        partial = sink_partials + (sequence * tiles + query_tile) * heads + head
        tl.store(partial, -tl.sum(tl.where(has_keys, share * difference, 0.0), axis=0))
    large = False
    if not ARE_LARGE:
        log = fma(top, LOG2E, log_sum)
        written = log
        if ARE_LARGE is None:
            large = tl.max(tl.where(has_keys, tl.abs(top), 0.0), axis=0) > LARGE
            written = tl.where(large, tl.where(has_keys, float("-inf"), float("nan")), log)
        tl.store(delta + row_kind + place, written, mask=is_row)

    if dq is not None:
        q_head = q.data + sequence * q.b + wide_head * q.h + query_first * q.s
        key_head = (head // group).to(tl.int64)
        k_head = k.data + sequence * k.b + key_head * k.h + key_first * k.s
        v_head = v.data + sequence * v.b + key_head * v.h + key_first * v.s
        if bias is not None:
            bias_head = bias.data + sequence * bias.b + wide_head * bias.h
        if words is not None:
            words = words_of(words, sequence, wide_head, words_b, words_h)
        if reach is not None:
            reach += sequence * reach_b + wide_head * reach_h
        query = load_rows(q_head, q, row, is_row, DIM, 0, DIM_FIRST)
        if DIM_REST > 0:
            query_rest = load_rows(q_head, q, row, is_row, DIM, DIM_FIRST, DIM_REST)

        acc = tl.zeros([BLOCK_QUERIES, DIM_FIRST], tl.float32)
        acc_rest = tl.zeros([BLOCK_QUERIES, DIM_REST if DIM_REST > 0 else 16], tl.float32)
        position = first_position(sequence, lengths.starts, start)
        begin, end = visible_keys(first_row, last_row, position, left, right, key_length)
        whole_begin, whole_end = common_keys(first_row, last_row, position, left, right, key_length)
        first, whole_first, whole_last, last = split_tiles(begin, end, whole_begin, whole_end, BLOCK_KEYS)
        IS_MASKED: tl.constexpr = words is not None or (reach is not None and bias is None)
        IS_BIASED: tl.constexpr = bias is not None
        unit = unit_of(score)
        if not ARE_LARGE:
            factor, shift = tl.where(large, unit, unit * LOG2E), tl.where(large, top, log)
        if IS_MASKED:
            whole_first, whole_last = first, first

        for edge in tl.static_range(1 if IS_MASKED else 0, 2):
            steps = (last - first) - (whole_last - whole_first) if edge else whole_last - whole_first
            # As in the forward; two loops in a row are not concerned, and take fewer registers without.
            if not IS_MASKED or steps > 0:
                for step in range(steps):
                    key_tile = edge_tile(step, first, whole_first, whole_last) if edge else whole_first + step
                    column = key_tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
                    inside = None
                    if edge:
                        inside = (column >= begin) & (column < end)
                    if reach is not None:
                        reached = column_bits(reach, column, column < key_length)
                        inside = reached & inside if edge else reached

                    key = load_rows(k_head, k, column, inside, DIM, 0, DIM_FIRST)
                    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                    if DIM_REST > 0:
                        key_rest = load_rows(k_head, k, column, inside, DIM, DIM_FIRST, DIM_REST)
                        products = tl.dot(query_rest, tl.trans(key_rest), products, input_precision=PRECISION)
                    value = load_rows(v_head, v, column, inside, VALUE_DIM, 0, VALUE_FIRST)
                    d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
                    if VALUE_REST > 0:
                        value = load_rows(v_head, v, column, inside, VALUE_DIM, VALUE_FIRST, VALUE_REST)
                        d_weights = tl.dot(d_out_rest, tl.trans(value), d_weights, input_precision=PRECISION)

                    scores, slope = bend(products, score)
                    if bias is not None:
                        address = bias_head + row.to(tl.int64)[:, None] * bias.s + column.to(tl.int64)[None, :] * bias.d
                        scores = add_bias(scores, unit, address, is_row[:, None] & (column < key_length)[None, :])
                    if ARE_LARGE:
                        scores = exponent(scores, unit, top[:, None], log_sum[:, None], 0.0, IS_BIASED)
                    else:
                        # As `exponent`; only one side of a branch reads a tile of products. Where both do, triton 3.6
                        # compiles nothing for sm_90.
                        scores = fms(scores, factor, shift[:, None])
                        if large:
                            scores = tl.minimum(scores * LOG2E - log_sum[:, None], 0.0)
                    weights = tl.exp2(scores)
                    if edge:
                        allowed = is_allowed(row[:, None], column[None, :], position, left, right, key_length)
                        if words is not None:
                            allowed &= mask_tile(words, row, words_s, is_row, key_tile * BLOCK_KEYS, BLOCK_KEYS)
                        elif reach is not None:
                            allowed &= inside[None, :]
                        weights = tl.where(allowed, weights, 0.0)
                    if seed is not None:
                        keep = keep_mask(
                            row[:, None], key_tile * BLOCK_KEYS, sequence * heads + head, site, seed, threshold,
                            BLOCK_KEYS,
                        )  # fmt: skip
                        d_weights = tl.where(keep, d_weights * tl.cast(keep_scale, tl.float32), 0.0)
                    d_scores = weights * (d_weights - difference[:, None]) * slope
                    d_scores = d_scores.to(k.data.dtype.element_ty)
                    acc = tl.dot(d_scores, key, acc, input_precision=PRECISION)
                    if DIM_REST > 0:
                        acc_rest = tl.dot(d_scores, key_rest, acc_rest, input_precision=PRECISION)

        scale = tl.cast(score.scale, tl.float32)
        is_empty = ~has_keys[:, None]
        dq_head = dq.data + sequence * dq.b + wide_head * dq.h + query_first * dq.s
        store_rows(dq_head, dq, tl.where(is_empty, 0.0, acc * scale), row, is_row, DIM, 0, DIM_FIRST)
        if DIM_REST > 0:
            store_rows(dq_head, dq, tl.where(is_empty, 0.0, acc_rest * scale), row, is_row, DIM, DIM_FIRST, DIM_REST)


@dataclass(frozen=True)
class QueryRows:
    """What the first pass leaves to the second, and to the gradient of a bias.

    Attributes:
        delta: laid out as the forward's statistics. Beside it the lse in units of log 2, inf without keys; in large
            tiles -inf, and NaN without keys. Nothing where all tiles are large.
        are_large: whether tiles are; None where some may be.
        tile: queries of a tile.
    """

    delta: Tensor
    are_large: bool | None
    tile: int


def tiles_are_large(call: Attention) -> bool | None:
    """Whether weights are rebuilt from two numbers a row; None where the tops of each tile decide.

    fp32 shows the lse's rounding at once. With a bias, two numbers cost nothing.
    """
    if call.query.dtype == torch.float32 or call.bias is not None:
        return True
    return None if call.softcap is None else call.softcap > LARGE.value


def attention_backward_queries(
    tape: Tape, call: AttentionBackward, dquery: Tensor | None, dsinks: Tensor | None
) -> QueryRows:
    """Fills the gradients that are given, and returns what the second pass takes. One launch."""
    attention = call.attention
    delta = row_statistics(call.query)
    tiles = launch.attention_backward_queries(*problem(tape, attention))
    blocks = -(-call.max_q // tiles.block_queries)
    are_large = tiles_are_large(attention)
    sink_partials = None
    if dsinks is not None:
        # Tiles behind a packed sequence's end write nothing.
        sink_partials = tape.zeros((attention.sequences * blocks, attention.heads), torch.float32, call.query.device)
    tape.launch(
        attention_backward_queries_kernel, (blocks * attention.sequences * attention.heads,), tiles.options,
        **common_arguments(attention_backward_queries_kernel, attention), sinks=None if dsinks is None else call.sinks,
        out=heads_of(call.output), dout=heads_of(call.dout), dq=heads_of(dquery),
        statistics=dense_statistics(attention, call.statistics), delta=delta, sink_partials=sink_partials,
        dlse=call.dlse, **dlse_strides(call.dlse), tiles=blocks, ARE_LARGE=are_large,
        TILE=(tiles.block_queries, tiles.block_keys),
    )  # fmt: skip
    if sink_partials is not None and dsinks is not None:
        sum_sinks(sink_partials, dsinks)
    return QueryRows(delta, are_large, tiles.block_queries)
