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

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_rows, problem
from tfm.kernels.attention.backward_queries import QueryRows
from tfm.kernels.attention.heads import head_of, heads_of, load_rows, products_of, store_rows, sums_of
from tfm.kernels.attention.scores import load_statistics, rows_of, scores_of, unit_of
from tfm.kernels.attention.visible import (
    allowed_tile,
    edge_tile,
    first_position,
    locate,
    reached,
    visible_tiles,
    word_rows,
)
from tfm.kernels.launch.attention import any_length as launch
from tfm.kernels.philox import keep_tile
from tfm.kernels.softmax import LOG2E, exponent, fms
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionBackward, Gradients

# Upper halves of fp32.
INF, MINUS_INF = tl.constexpr(0x7F80), tl.constexpr(0xFF80 - 0x10000)


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def attention_backward_keys_kernel(
    q, k, v, bias, dout, dk, dv, statistics, delta, mask, lengths, window, score, dropout,
    heads, group, query_size, key_size, row_words, row_kind, tiles, start, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, IS_GROUPED: tl.constexpr,
    ARE_LARGE: tl.constexpr, FIRST_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program takes BLOCK_KEYS keys of one (sequence, key head); tiles are [keys, queries].

    Of a head dim that is slices, it makes one of dk or of dv.
    """
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    OCTETS: tl.constexpr = TILE[2]
    SLICES: tl.constexpr = VALUE_DIMS[3] if dk is None else DIMS[3]
    program = tl.program_id(0)
    if SLICES == 1:
        part: tl.constexpr = 0
    else:
        part, program = program % SLICES, program // SLICES
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

    k_head = head_of(k, sequence, key_head, key_first)
    v_head = head_of(v, sequence, key_head, key_first)
    if DIMS[3] == 1:
        key = load_rows(k_head, k, column, is_key, DIMS, 0)
    if VALUE_DIMS[3] == 1:
        value = load_rows(v_head, v, column, is_key, VALUE_DIMS, 0)
    if DIMS[2] > 0:
        key_rest = load_rows(k_head, k, column, is_key, DIMS, 1)
    if VALUE_DIMS[2] > 0:
        value_rest = load_rows(v_head, v, column, is_key, VALUE_DIMS, 1)
    d_key = sums_of(BLOCK_KEYS, DIMS, 0)
    d_key_rest = sums_of(BLOCK_KEYS, DIMS, 1)
    d_value = sums_of(BLOCK_KEYS, VALUE_DIMS, 0)
    d_value_rest = sums_of(BLOCK_KEYS, VALUE_DIMS, 1)

    position = first_position(sequence, lengths.starts, start)
    seen_length = tl.where(first_key < key_length, query_length, 0)
    if mask.keys is not None:
        is_valid = tl.load(mask.keys + sequence * key_size + column, mask=is_key, other=0) != 0
        seen_length = tl.where(tl.max(is_valid.to(tl.int32), axis=0) != 0, seen_length, 0)
    begin, end, first, whole_first, whole_last, last = visible_tiles(
        first_key, last_key, -position, window.right, window.left, seen_length, BLOCK_QUERIES
    )
    IS_MASKED: tl.constexpr = (
        mask.words is not None or mask.keys is not None or (mask.reach is not None and bias is None)
    )
    IS_BIASED: tl.constexpr = bias is not None or score.relative_bias is not None
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
                q_head = head_of(q, sequence, head, query_first)
                dout_head = head_of(dout, sequence, head, query_first)
                head_rows = rows_of(sequence, head, query_first, heads, query_size, row_kind, lengths.cu_seq_q)
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
                if mask.reach is not None or mask.keys is not None:
                    # A query without keys may hold anything.
                    has_keys = shift < float("inf")
                    inside = inside & has_keys if edge else has_keys

                if DIMS[3] > 1:
                    products = products_of(k_head, k, column, is_key, q_head, q, row, inside, DIMS, PRECISION)
                else:
                    query = load_rows(q_head, q, row, inside, DIMS, 0)
                    products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
                if DIMS[2] > 0:
                    query_rest = load_rows(q_head, q, row, inside, DIMS, 1)
                    products = tl.dot(key_rest, tl.trans(query_rest), products, input_precision=PRECISION)
                scores, slope = scores_of(
                    products, score, unit, bias, sequence, head, row[None, :], column[:, None], position,
                    (row < query_length)[None, :] & is_key[:, None],
                )  # fmt: skip
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
                    words = word_rows(mask, sequence, head, heads, query_size, row_words)
                    allowed = allowed_tile(
                        is_key, row, column, row < query_length, position, window, words, first_key, row_words,
                        BLOCK_KEYS, KEYS_ARE_ROWS=True,
                    )  # fmt: skip
                    # A row that is not read has 0 for its query, but 0 · NaN is a score where the key is NaN.
                    allowed &= inside[None, :]
                    if mask.keys is not None or (mask.reach is not None and mask.words is None):
                        allowed &= reached(mask, sequence, head, heads, column, is_key, row_words, key_size)[:, None]
                    weights = tl.where(allowed, weights, 0.0)

                if VALUE_DIMS[3] == 1:
                    d_out = load_rows(dout_head, dout, row, inside, VALUE_DIMS, 0)
                elif dv is not None:
                    d_out = load_rows(dout_head, dout, row, inside, VALUE_DIMS, part)
                kept = weights
                if dropout.seed is not None:
                    keep = keep_tile(
                        row[:, None], first_key, sequence * heads + head, site, dropout.seed, dropout.threshold,
                        BLOCK_KEYS, OCTETS,
                    )  # fmt: skip
                    keep = tl.trans(keep)
                    kept = tl.where(keep, weights, 0.0)
                kept = kept.to(v.data.dtype.element_ty)
                if dv is not None:
                    d_value = tl.dot(kept, d_out, d_value, input_precision=PRECISION)
                if dk is not None:
                    if VALUE_DIMS[3] > 1:
                        d_weights = products_of(
                            v_head, v, column, is_key, dout_head, dout, row, inside, VALUE_DIMS, PRECISION
                        )
                    else:
                        d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
                if VALUE_DIMS[2] > 0:
                    d_out = load_rows(dout_head, dout, row, inside, VALUE_DIMS, 1)
                    if dv is not None:
                        d_value_rest = tl.dot(kept, d_out, d_value_rest, input_precision=PRECISION)
                    if dk is not None:
                        d_weights = tl.dot(value_rest, tl.trans(d_out), d_weights, input_precision=PRECISION)
                if dk is not None:
                    if dropout.seed is not None:
                        d_weights = tl.where(keep, d_weights * tl.cast(dropout.keep_scale, tl.float32), 0.0)
                    d_scores = weights * (d_weights - difference[None, :]) * slope
                    if edge or IS_BIASED:
                        # The value of a masked key may be NaN.
                        d_scores = tl.where(weights == 0.0, 0.0, d_scores)
                    d_scores = d_scores.to(q.data.dtype.element_ty)
                    if DIMS[3] > 1:
                        query = load_rows(q_head, q, row, inside, DIMS, part)
                    d_key = tl.dot(d_scores, query, d_key, input_precision=PRECISION)
                    if DIMS[2] > 0:
                        d_key_rest = tl.dot(d_scores, query_rest, d_key_rest, input_precision=PRECISION)

    is_stored, is_key = column < stored_length, is_key[:, None]
    if dk is not None:
        scale = tl.cast(score.scale, tl.float32)
        dk_head = head_of(dk, sequence, key_head, key_first)
        store_rows(dk_head, dk, tl.where(is_key, d_key * scale, 0.0), column, is_stored, DIMS, part)
        if DIMS[2] > 0:
            store_rows(dk_head, dk, tl.where(is_key, d_key_rest * scale, 0.0), column, is_stored, DIMS, 1)
    if dv is not None:
        factor = tl.cast(dropout.keep_scale, tl.float32)
        dv_head = head_of(dv, sequence, key_head, key_first)
        store_rows(dv_head, dv, tl.where(is_key, d_value * factor, 0.0), column, is_stored, VALUE_DIMS, part)
        if VALUE_DIMS[2] > 0:
            store_rows(dv_head, dv, tl.where(is_key, d_value_rest * factor, 0.0), column, is_stored, VALUE_DIMS, 1)


@triton.jit
def is_large(lse, first_row, query_length, BLOCK_QUERIES: tl.constexpr, TILE: tl.constexpr):
    """Tells whether one of these rows lies in a large tile of the first pass, where all are -inf or NaN."""
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


def attention_backward_keys(tape: Tape, call: AttentionBackward, rows: QueryRows, gradients: Gradients) -> None:
    """Fills the gradients of key and value. One launch, or one for each where both do not fit the registers."""
    attention = call.attention
    statistics = dense_rows(attention, call.statistics)
    tiles = launch.attention_backward_keys(*problem(tape, attention))
    blocks = -(-call.max_k // tiles.block_keys)
    dk, dv = heads_of(gradients.key), heads_of(gradients.value)
    arguments = common_arguments(attention_backward_keys_kernel, attention)
    slices = arguments["DIMS"][3], arguments["VALUE_DIMS"][3]
    made = [(dk, dv)] if tiles.passes == 1 and slices == (1, 1) else [(dk, None), (None, dv)]
    for dk, dv in made:
        if dk is None and dv is None:
            continue
        programs = blocks * attention.sequences * attention.key_heads * slices[dk is None]
        tape.launch(
            attention_backward_keys_kernel, (programs,), tiles.options, **arguments,
            statistics=statistics, delta=rows.delta, dout=heads_of(call.dout), dk=dk, dv=dv, tiles=blocks,
            IS_GROUPED=attention.heads != attention.key_heads, ARE_LARGE=rows.are_large, FIRST_TILE=rows.tile,
            TILE=tiles.tile,
        )  # fmt: skip
