"""Attention of any length, backward, second pass: the gradients of keys and values.

With p, ds and slope of tfm.kernels.attention.backward_queries, summed over the queries of all heads that share a key,

    dv = Σ dropout(p)ᵀ dout      dk = scale · Σ (ds · slope)ᵀ q

A program keeps one tile of keys and values, and goes over heads and tiles of queries, always in the same order. Tiles
are formed with keys as rows: pᵀ and dsᵀ then are the left operands of their products as they stand in registers, and
never pass through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_statistics, heads_of, problem
from tfm.kernels.attention.backward_queries import QueryRows
from tfm.kernels.attention.scores import (
    add_bias,
    bend,
    column_bits,
    common_queries,
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
    unit_of,
    visible_queries,
    words_of,
)
from tfm.kernels.launch.attention import any_length as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import LOG2E, exponent, fms
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionBackward

# Upper halves of fp32.
INF, MINUS_INF = tl.constexpr(0x7F80), tl.constexpr(0xFF80 - 0x10000)


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def attention_backward_keys_kernel(
    q, k, v, bias, dout, dk, dv, words, reach, seed, lengths, statistics, delta,
    words_b, words_h, words_s, reach_b, reach_h, row_kind, row_h,
    heads, group, query_size, key_size, tiles, start, left, right, score, threshold, keep_scale, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, IS_GROUPED: tl.constexpr,
    ARE_LARGE: tl.constexpr, FIRST_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program has BLOCK_KEYS keys of one (sequence, key head); tiles are [keys, queries]."""
    DIM: tl.constexpr = DIMS[0]
    DIM_FIRST: tl.constexpr = DIMS[1]
    DIM_REST: tl.constexpr = DIMS[2]
    VALUE_DIM: tl.constexpr = VALUE_DIMS[0]
    VALUE_FIRST: tl.constexpr = VALUE_DIMS[1]
    VALUE_REST: tl.constexpr = VALUE_DIMS[2]
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    program = tl.program_id(0)
    key_heads = heads // group
    sequence, key_head = (program // tiles // key_heads).to(tl.int64), (program // tiles % key_heads).to(tl.int64)
    query_first, query_length = locate(sequence, lengths.cu_seq_q, None, query_size)
    key_first, key_length = locate(sequence, lengths.cu_seq_k, lengths.key_lengths, key_size)
    first_key = program % tiles * BLOCK_KEYS
    # Padded keys, too, have their gradient written: 0.
    stored_length = key_length if lengths.cu_seq_k is not None else tl.cast(key_size, tl.int32)
    if first_key >= stored_length:
        return
    column = first_key + tl.arange(0, BLOCK_KEYS)
    is_key = column < key_length
    last_key = tl.minimum(first_key + BLOCK_KEYS, key_length) - 1

    k_head = k.data + sequence * k.b + key_head * k.h + key_first * k.s
    v_head = v.data + sequence * v.b + key_head * v.h + key_first * v.s
    key = load_rows(k_head, k, column, is_key, DIM, 0, DIM_FIRST)
    value = load_rows(v_head, v, column, is_key, VALUE_DIM, 0, VALUE_FIRST)
    if DIM_REST > 0:
        key_rest = load_rows(k_head, k, column, is_key, DIM, DIM_FIRST, DIM_REST)
    if VALUE_REST > 0:
        value_rest = load_rows(v_head, v, column, is_key, VALUE_DIM, VALUE_FIRST, VALUE_REST)
    d_key = tl.zeros([BLOCK_KEYS, DIM_FIRST], tl.float32)
    d_key_rest = tl.zeros([BLOCK_KEYS, DIM_REST if DIM_REST > 0 else 16], tl.float32)
    d_value = tl.zeros([BLOCK_KEYS, VALUE_FIRST], tl.float32)
    d_value_rest = tl.zeros([BLOCK_KEYS, VALUE_REST if VALUE_REST > 0 else 16], tl.float32)

    position = first_position(sequence, lengths.starts, start)
    begin, end = visible_queries(first_key, last_key, position, left, right, query_length)
    whole_begin, whole_end = common_queries(first_key, last_key, position, left, right, query_length)
    end = tl.where(first_key < key_length, end, begin)
    first, whole_first, whole_last, last = split_tiles(begin, end, whole_begin, whole_end, BLOCK_QUERIES)
    IS_MASKED: tl.constexpr = words is not None or (reach is not None and bias is None)
    IS_BIASED: tl.constexpr = bias is not None
    unit = unit_of(score)
    if IS_MASKED:
        whole_first, whole_last = first, first

    for edge in tl.static_range(1 if IS_MASKED else 0, 2):
        steps = (last - first) - (whole_last - whole_first) if edge else whole_last - whole_first
        # One loop over heads and tiles: what a loop within a loop prepares fills the registers of both.
        turns = group * steps if IS_GROUPED else steps
        # As in the forward: no sums in flight meet zeros.
        if turns > 0:
            for step in range(turns):
                head, turn = key_head, step
                if IS_GROUPED:
                    head, turn = key_head * group + step // steps, step % steps
                q_head = q.data + sequence * q.b + head * q.h + query_first * q.s
                dout_head = dout.data + sequence * dout.b + head * dout.h + query_first * dout.s
                head_rows = first_number(sequence, head, query_first, heads, row_h, lengths.cu_seq_q)
                query_tile = edge_tile(turn, first, whole_first, whole_last) if edge else whole_first + turn
                row = query_tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
                inside = None
                if edge:
                    inside = (row >= begin) & (row < end)
                difference = tl.load(delta + head_rows + row, mask=inside, other=0.0 if edge else None)
                if ARE_LARGE:
                    shift, log_sum = load_statistics(statistics + head_rows + row, row_kind, inside)
                else:
                    # inf or NaN for a query without keys.
                    shift = tl.load(
                        delta + row_kind + head_rows + row, mask=inside, other=float("inf") if edge else None
                    )
                large = False
                if ARE_LARGE is None:
                    lse = delta + row_kind + head_rows
                    large = is_large(lse, query_tile * BLOCK_QUERIES, query_length, BLOCK_QUERIES, FIRST_TILE)
                if reach is not None:
                    # A query without keys may hold anything.
                    has_keys = shift < float("inf")
                    inside = inside & has_keys if edge else has_keys

                query = load_rows(q_head, q, row, inside, DIM, 0, DIM_FIRST)
                products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
                if DIM_REST > 0:
                    query_rest = load_rows(q_head, q, row, inside, DIM, DIM_FIRST, DIM_REST)
                    products = tl.dot(key_rest, tl.trans(query_rest), products, input_precision=PRECISION)
                scores, slope = bend(products, score)
                if bias is not None:
                    address = bias.data + sequence * bias.b + head * bias.h + row.to(tl.int64)[None, :] * bias.s
                    address += column.to(tl.int64)[:, None] * bias.d
                    scores = add_bias(scores, unit, address, (row < query_length)[None, :] & is_key[:, None])
                if ARE_LARGE:
                    scores = exponent(scores, unit, shift[None, :], log_sum[None, :], 0.0, IS_BIASED)
                else:
                    # As in the first pass.
                    factor, log_sum = unit * LOG2E, shift
                    if large:
                        factor = unit
                        shift, log_sum = load_statistics(statistics + head_rows + row, row_kind, inside)
                    scores = fms(scores, factor, shift[None, :])
                    if large:
                        scores = tl.minimum(scores * LOG2E - log_sum[None, :], 0.0)
                weights = tl.exp2(scores)
                if edge:
                    # A row that is not read has 0 for its query, but 0 · NaN is a score where the key is NaN.
                    allowed = is_allowed(row[None, :], column[:, None], position, left, right, key_length)
                    allowed &= inside[None, :]
                    if words is not None:
                        words_head = words_of(words, sequence, head, words_b, words_h)
                        bits = mask_tile(words_head, row, words_s, row < query_length, first_key, BLOCK_KEYS)
                        allowed &= tl.trans(bits)
                    elif reach is not None:
                        reach_head = reach + sequence * reach_b + head * reach_h
                        allowed &= column_bits(reach_head, column, is_key)[:, None]
                    weights = tl.where(allowed, weights, 0.0)

                d_out = load_rows(dout_head, dout, row, inside, VALUE_DIM, 0, VALUE_FIRST)
                kept = weights
                if seed is not None:
                    keep = tl.trans(
                        keep_mask(row[:, None], first_key, sequence * heads + head, site, seed, threshold, BLOCK_KEYS)
                    )
                    kept = tl.where(keep, weights, 0.0)
                kept = kept.to(v.data.dtype.element_ty)
                if dv is not None:
                    d_value = tl.dot(kept, d_out, d_value, input_precision=PRECISION)
                if dk is not None:
                    d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
                if VALUE_REST > 0:
                    d_out = load_rows(dout_head, dout, row, inside, VALUE_DIM, VALUE_FIRST, VALUE_REST)
                    if dv is not None:
                        d_value_rest = tl.dot(kept, d_out, d_value_rest, input_precision=PRECISION)
                    if dk is not None:
                        d_weights = tl.dot(value_rest, tl.trans(d_out), d_weights, input_precision=PRECISION)
                if dk is not None:
                    if seed is not None:
                        d_weights = tl.where(keep, d_weights * tl.cast(keep_scale, tl.float32), 0.0)
                    d_scores = weights * (d_weights - difference[None, :]) * slope
                    if edge or bias is not None:
                        # The value of a masked key may be NaN.
                        d_scores = tl.where(weights == 0.0, 0.0, d_scores)
                    d_scores = d_scores.to(q.data.dtype.element_ty)
                    d_key = tl.dot(d_scores, query, d_key, input_precision=PRECISION)
                    if DIM_REST > 0:
                        d_key_rest = tl.dot(d_scores, query_rest, d_key_rest, input_precision=PRECISION)

    is_stored, is_key = column < stored_length, is_key[:, None]
    if dk is not None:
        scale = tl.cast(score.scale, tl.float32)
        dk_head = dk.data + sequence * dk.b + key_head * dk.h + key_first * dk.s
        store_rows(dk_head, dk, tl.where(is_key, d_key * scale, 0.0), column, is_stored, DIM, 0, DIM_FIRST)
        if DIM_REST > 0:
            d_key_rest = tl.where(is_key, d_key_rest * scale, 0.0)
            store_rows(dk_head, dk, d_key_rest, column, is_stored, DIM, DIM_FIRST, DIM_REST)
    if dv is not None:
        factor = tl.cast(keep_scale, tl.float32)
        dv_head = dv.data + sequence * dv.b + key_head * dv.h + key_first * dv.s
        d_value = tl.where(is_key, d_value * factor, 0.0)
        store_rows(dv_head, dv, d_value, column, is_stored, VALUE_DIM, 0, VALUE_FIRST)
        if VALUE_REST > 0:
            d_value_rest = tl.where(is_key, d_value_rest * factor, 0.0)
            store_rows(dv_head, dv, d_value_rest, column, is_stored, VALUE_DIM, VALUE_FIRST, VALUE_REST)


@triton.jit
def is_large(lse, first_row, query_length, BLOCK_QUERIES: tl.constexpr, TILE: tl.constexpr):
    """Whether one of these BLOCK_QUERIES rows lies in a large tile of the first pass, where all are -inf or NaN."""
    # The upper halves of the numbers: so short a load is no copy to shared memory, for which all would wait.
    upper = (lse + first_row).to(tl.pointer_type(tl.int16)) + 1
    if BLOCK_QUERIES <= TILE:
        half = tl.load(upper)
        found = (half == MINUS_INF) | (half > INF)
    else:
        row = tl.arange(0, BLOCK_QUERIES // TILE) * TILE
        half = tl.load(upper + 2 * row, mask=first_row + row < query_length, other=0)
        found = tl.max(((half == MINUS_INF) | (half > INF)).to(tl.int32), axis=0) != 0
    return found


def attention_backward_keys(
    tape: Tape, call: AttentionBackward, rows: QueryRows, dkey: Tensor | None, dvalue: Tensor | None
) -> None:
    """Fills the gradients that are given. One launch, or one for each where both do not fit the registers."""
    attention = call.attention
    statistics = dense_statistics(attention, call.statistics)
    tiles = launch.attention_backward_keys(*problem(tape, attention))
    blocks = -(-call.max_k // tiles.block_keys)
    made = [(dkey, dvalue)] if tiles.passes == 1 else [(dkey, None), (None, dvalue)]
    for dk, dv in made:
        if dk is None and dv is None:
            continue
        tape.launch(
            attention_backward_keys_kernel, (blocks * attention.sequences * attention.key_heads,), tiles.options,
            **common_arguments(attention_backward_keys_kernel, attention), statistics=statistics, delta=rows.delta,
            dout=heads_of(call.dout), dk=heads_of(dk), dv=heads_of(dv), tiles=blocks,
            IS_GROUPED=attention.heads != attention.key_heads, ARE_LARGE=rows.are_large, FIRST_TILE=rows.tile,
            TILE=(tiles.block_queries, tiles.block_keys),
        )  # fmt: skip
