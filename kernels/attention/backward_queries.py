"""Attention of any length, backward, first pass: delta, the gradient of the queries, and the sink's.

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

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_rows, is_biased, problem
from tfm.kernels.attention.heads import head_of, heads_of, load_rows, products_of, row_products, store_rows, sums_of
from tfm.kernels.attention.scores import (
    load_statistics,
    rows_of,
    scores_of,
    sink_gradient,
    sink_partials,
    sum_partials,
    unit_of,
)
from tfm.kernels.attention.visible import (
    allowed_tile,
    edge_tile,
    first_position,
    locate,
    reached,
    valid_span,
    visible_tiles,
    word_rows,
)
from tfm.kernels.launch.attention import any_length as launch
from tfm.kernels.philox import keep_tile
from tfm.kernels.softmax import LARGE, LOG2E, exponent, fma, fms
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention, AttentionBackward, Gradients, row_statistics


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def attention_backward_queries_kernel(
    q, k, v, bias, out, dout, dq, statistics, dlse, delta, partials, mask, lengths, window, score, dropout,
    heads, group, query_size, key_size, row_words, row_kind, tiles, start, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, ARE_LARGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program takes BLOCK_QUERIES queries of one (sequence, head) and goes over the keys that they see."""
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    OCTETS: tl.constexpr = TILE[2]
    program = tl.program_id(0)
    if dq is None or DIMS[3] == 1:
        part: tl.constexpr = 0
    else:
        part, program = program % DIMS[3], program // DIMS[3]
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

    out_head = head_of(out, sequence, wide_head, query_first)
    dout_head = head_of(dout, sequence, wide_head, query_first)
    if VALUE_DIMS[3] > 1:
        difference = row_products(dout_head, dout, out_head, out, row, is_row, VALUE_DIMS)
    else:
        d_out = load_rows(dout_head, dout, row, is_row, VALUE_DIMS, 0)
        output = load_rows(out_head, out, row, is_row, VALUE_DIMS, 0)
        difference = tl.sum(d_out.to(tl.float32) * output.to(tl.float32), axis=1)
    if VALUE_DIMS[2] > 0:
        d_out_rest = load_rows(dout_head, dout, row, is_row, VALUE_DIMS, 1)
        output = load_rows(out_head, out, row, is_row, VALUE_DIMS, 1)
        difference += tl.sum(d_out_rest.to(tl.float32) * output.to(tl.float32), axis=1)
    place = rows_of(sequence, wide_head, query_first, heads, query_size, row_kind, lengths.cu_seq_q) + row
    if dlse is not None:
        difference -= tl.load(dlse + place, mask=is_row, other=0.0)
    # Of the programs that each make a slice of dq, the first writes what is the row's.
    tl.store(delta + place, difference, mask=is_row & (part == 0))
    top, log_sum = load_statistics(statistics + place, row_kind, is_row)
    has_keys = top < float("inf")
    if partials is not None:
        partial = partials + (sequence * tiles + query_tile) * heads + head
        if part == 0:
            tl.store(partial, tl.sum(sink_gradient(score, head, top, log_sum, difference), axis=0))
    large = False
    if not ARE_LARGE:
        log = fma(top, LOG2E, log_sum)
        written = log
        if ARE_LARGE is None:
            large = tl.max(tl.where(has_keys, tl.abs(top), 0.0), axis=0) > LARGE
            written = tl.where(large, tl.where(has_keys, float("-inf"), float("nan")), log)
        tl.store(delta + row_kind + place, written, mask=is_row & (part == 0))

    if dq is not None:
        q_head = head_of(q, sequence, wide_head, query_first)
        key_head = (head // group).to(tl.int64)
        k_head = head_of(k, sequence, key_head, key_first)
        v_head = head_of(v, sequence, key_head, key_first)
        words = word_rows(mask, sequence, wide_head, heads, query_size, row_words)
        if DIMS[3] == 1:
            query = load_rows(q_head, q, row, is_row, DIMS, 0)
        if DIMS[2] > 0:
            query_rest = load_rows(q_head, q, row, is_row, DIMS, 1)

        acc = sums_of(BLOCK_QUERIES, DIMS, 0)
        acc_rest = sums_of(BLOCK_QUERIES, DIMS, 1)
        position = first_position(sequence, lengths.starts, start)
        if mask.keys is not None:
            valid_begin, key_length = valid_span(mask, sequence, key_size, key_length)
        begin, end, first, whole_first, whole_last, last = visible_tiles(
            first_row, last_row, position, window.left, window.right, key_length, BLOCK_KEYS
        )
        if mask.keys is not None:
            # Padding on the left costs as little as behind the last key.
            begin, first = (
                tl.maximum(begin, valid_begin),
                tl.minimum(tl.maximum(first, valid_begin // BLOCK_KEYS), last),
            )
        IS_MASKED: tl.constexpr = (
            words is not None or mask.keys is not None or (mask.reach is not None and bias is None)
        )
        IS_BIASED: tl.constexpr = bias is not None or score.relative_bias is not None
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
                    if mask.reach is not None or mask.keys is not None:
                        bits = reached(
                            mask, sequence, wide_head, heads, column, column < key_length, row_words, key_size
                        )
                        inside = bits & inside if edge else bits

                    if DIMS[3] > 1:
                        products = products_of(q_head, q, row, is_row, k_head, k, column, inside, DIMS, PRECISION)
                    else:
                        key = load_rows(k_head, k, column, inside, DIMS, 0)
                        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                    if DIMS[2] > 0:
                        key_rest = load_rows(k_head, k, column, inside, DIMS, 1)
                        products = tl.dot(query_rest, tl.trans(key_rest), products, input_precision=PRECISION)
                    if VALUE_DIMS[3] > 1:
                        d_weights = products_of(
                            dout_head, dout, row, is_row, v_head, v, column, inside, VALUE_DIMS, PRECISION
                        )
                    else:
                        value = load_rows(v_head, v, column, inside, VALUE_DIMS, 0)
                        d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
                    if VALUE_DIMS[2] > 0:
                        value = load_rows(v_head, v, column, inside, VALUE_DIMS, 1)
                        d_weights = tl.dot(d_out_rest, tl.trans(value), d_weights, input_precision=PRECISION)

                    scores, slope = scores_of(
                        products, score, unit, bias, sequence, wide_head, row[:, None], column[None, :], position,
                        is_row[:, None] & (column < key_length)[None, :],
                    )  # fmt: skip
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
                        seen = column < key_length
                        if mask.keys is not None or (mask.reach is not None and words is None):
                            seen &= inside
                        allowed = allowed_tile(
                            seen, row, column, is_row, position, window, words, key_tile * BLOCK_KEYS, row_words,
                            BLOCK_KEYS, KEYS_ARE_ROWS=False,
                        )  # fmt: skip
                        weights = tl.where(allowed, weights, 0.0)
                    if dropout.seed is not None:
                        keep = keep_tile(
                            row[:, None], key_tile * BLOCK_KEYS, sequence * heads + head, site, dropout.seed,
                            dropout.threshold, BLOCK_KEYS, OCTETS,
                        )  # fmt: skip
                        d_weights = tl.where(keep, d_weights * tl.cast(dropout.keep_scale, tl.float32), 0.0)
                    d_scores = weights * (d_weights - difference[:, None]) * slope
                    d_scores = d_scores.to(k.data.dtype.element_ty)
                    if DIMS[3] > 1:
                        key = load_rows(k_head, k, column, inside, DIMS, part)
                    acc = tl.dot(d_scores, key, acc, input_precision=PRECISION)
                    if DIMS[2] > 0:
                        acc_rest = tl.dot(d_scores, key_rest, acc_rest, input_precision=PRECISION)

        scale = tl.cast(score.scale, tl.float32)
        is_empty = ~has_keys[:, None]
        dq_head = head_of(dq, sequence, wide_head, query_first)
        store_rows(dq_head, dq, tl.where(is_empty, 0.0, acc * scale), row, is_row, DIMS, part)
        if DIMS[2] > 0:
            store_rows(dq_head, dq, tl.where(is_empty, 0.0, acc_rest * scale), row, is_row, DIMS, 1)


@dataclass(frozen=True)
class QueryRows:
    """The results of the first pass that the second and the gradient of a bias need.

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
    """Tells whether weights are rebuilt from two numbers a row; None where the tops of each tile decide.

    fp32 shows the lse's rounding at once. With a bias, two numbers cost nothing.
    """
    if call.query.dtype == torch.float32 or is_biased(call):
        return True
    return None if call.softcap is None else call.softcap > LARGE.value


def attention_backward_queries(tape: Tape, call: AttentionBackward, gradients: Gradients) -> QueryRows:
    """Fills the gradients of the query and of the sink, and returns what the second pass takes. One launch."""
    attention = call.attention
    delta = tape.scratch(row_statistics(call.query))
    tiles = launch.attention_backward_queries(*problem(tape, attention))
    blocks = -(-call.max_q // tiles.block_queries)
    are_large = tiles_are_large(attention)
    partials = sink_partials(tape, call, gradients, blocks)
    arguments = common_arguments(attention_backward_queries_kernel, attention, with_sink=partials is not None)
    slices = 1 if gradients.query is None else arguments["DIMS"][3]
    tape.launch(
        attention_backward_queries_kernel, (blocks * attention.sequences * attention.heads * slices,), tiles.options,
        **arguments, out=heads_of(call.output), dout=heads_of(call.dout), dq=heads_of(gradients.query),
        statistics=dense_rows(attention, call.statistics), dlse=dense_rows(attention, call.dlse), delta=delta,
        partials=partials, tiles=blocks, ARE_LARGE=are_large, TILE=tiles.tile,
    )  # fmt: skip
    sum_partials(partials, gradients)
    return QueryRows(delta, are_large, tiles.block_queries)
