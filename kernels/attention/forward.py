"""Attention of any length, forward: one pass over the keys, softmax on the fly.

(Dao et al., "FlashAttention", NeurIPS 2022, algorithm 1, with the loops exchanged as in "FlashAttention-2", 2023,
section 3.1; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.) For a tile of queries, over the
tiles of keys, with the scores s of tfm.kernels.attention.scores:

    top' = max(top, max(s))      p = exp(s - top')      sum = sum · exp(top - top') + Σ p
    acc = acc · exp(top - top') + dropout(p) v

and at the end out = acc / sum, and top and log2 sum apart. A sink is one more score, of a key without a value. A query
without keys has sum 0: its output is 0 and its top -inf, sink or not.

Read: q once, k and v once for each tile of queries that sees them (from the second-level cache after the first), a bit
for each element of a dense mask. Written: out and two numbers a row. Tiles of keys that length and window exclude are
not touched; tiles that every query sees whole have a loop of their own without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import VARYING, common_arguments, heads_of, problem
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
    locate,
    mask_tile,
    split_tiles,
    store_rows,
    unit_of,
    visible_keys,
    words_of,
)
from tfm.kernels.launch.attention import any_length as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import LOG2E, binary, natural_top, power, shrinkage
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def attention_forward_kernel(
    q, k, v, bias, out, words, reach, sinks, seed, lengths, statistics,
    words_b, words_h, words_s, reach_b, reach_h, row_kind, row_h,
    heads, group, query_size, key_size, tiles, start, left, right, score, threshold, keep_scale, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, IS_WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program attends with BLOCK_QUERIES queries of one (sequence, head); a head's last queries go first."""
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
    first_row = (tiles - 1 - program % tiles) * BLOCK_QUERIES
    if first_row >= query_length:
        return
    last_row = tl.minimum(first_row + BLOCK_QUERIES, query_length) - 1
    row = first_row + tl.arange(0, BLOCK_QUERIES)
    is_row = row < query_length
    position = first_position(sequence, lengths.starts, start)
    dropout_group = sequence * heads + head

    q_head = q.data + sequence * q.b + head.to(tl.int64) * q.h + query_first * q.s
    key_head = (head // group).to(tl.int64)
    k_head = k.data + sequence * k.b + key_head * k.h + key_first * k.s
    v_head = v.data + sequence * v.b + key_head * v.h + key_first * v.s
    if bias is not None:
        bias_head = bias.data + sequence * bias.b + head.to(tl.int64) * bias.h
    if words is not None:
        words = words_of(words, sequence, head.to(tl.int64), words_b, words_h)
    if reach is not None:
        reach += sequence * reach_b + head.to(tl.int64) * reach_h

    query = load_rows(q_head, q, row, is_row, DIM, 0, DIM_FIRST)
    if DIM_REST > 0:
        query_rest = load_rows(q_head, q, row, is_row, DIM, DIM_FIRST, DIM_REST)
    unit = unit_of(score)
    is_turned = unit < 0
    if not IS_WIDE:
        # A negative scale turns q around, once, so that the largest product has the largest score. What has been
        # computed with stays in registers on sm_90, where it halves what products read of shared memory.
        query = tl.where(is_turned, -query, query)
        if DIM_REST > 0:
            query_rest = tl.where(is_turned, -query_rest, query_rest)
    unit = tl.abs(unit)
    IS_BIASED: tl.constexpr = bias is not None
    scale = 1.0 if IS_BIASED else binary(unit)

    top = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    acc = tl.zeros([BLOCK_QUERIES, VALUE_FIRST], tl.float32)
    # Without a rest of the head dim this is never touched.
    acc_rest = tl.zeros([BLOCK_QUERIES, VALUE_REST if VALUE_REST > 0 else 16], tl.float32)
    begin, end = visible_keys(first_row, last_row, position, left, right, key_length)
    whole_begin, whole_end = common_keys(first_row, last_row, position, left, right, key_length)
    first, whole_first, whole_last, last = split_tiles(begin, end, whole_begin, whole_end, BLOCK_KEYS)
    # A mask as bits may have a hole anywhere.
    IS_MASKED: tl.constexpr = words is not None or (reach is not None and not IS_BIASED)
    if IS_MASKED:
        whole_first, whole_last = first, first

    for edge in tl.static_range(1 if IS_MASKED else 0, 2):
        steps = (last - first) - (whole_last - whole_first) if edge else whole_last - whole_first
        # Sums that meet the zeros of no step before they are waited for have the assembler wait for every product.
        if steps > 0:
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
                    key = load_rows(k_head, k, column, inside, DIM, DIM_FIRST, DIM_REST)
                    products = tl.dot(query_rest, tl.trans(key), products, input_precision=PRECISION)

                scores, _ = bend(products, score)
                if IS_WIDE:
                    scores *= tl.where(is_turned, -1.0, 1.0)
                if bias is not None:
                    address = bias_head + row.to(tl.int64)[:, None] * bias.s + column.to(tl.int64)[None, :] * bias.d
                    scores = add_bias(scores, unit, address, is_row[:, None] & (column < key_length)[None, :])
                if edge:
                    allowed = is_allowed(row[:, None], column[None, :], position, left, right, key_length)
                    if words is not None:
                        allowed &= mask_tile(words, row, words_s, is_row, key_tile * BLOCK_KEYS, BLOCK_KEYS)
                    elif reach is not None:
                        allowed &= inside[None, :]
                    scores = tl.where(allowed, scores, float("-inf"))

                higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
                shift = higher
                if edge or IS_BIASED:
                    shift = tl.where(higher == float("-inf"), 0.0, higher)
                weights = power(scores, shift[:, None], scale, IS_BIASED)
                shrink = shrinkage(top, shift, IS_BIASED)
                total = total * shrink + tl.sum(weights, axis=1)
                acc = acc * shrink[:, None]
                if seed is not None:
                    keep = keep_mask(
                        row[:, None], key_tile * BLOCK_KEYS, dropout_group, site, seed, threshold, BLOCK_KEYS
                    )
                    weights = tl.where(keep, weights, 0.0)
                weights = weights.to(v.data.dtype.element_ty)
                value = load_rows(v_head, v, column, inside, VALUE_DIM, 0, VALUE_FIRST)
                acc = tl.dot(weights, value, acc, input_precision=PRECISION)
                if VALUE_REST > 0:
                    value = load_rows(v_head, v, column, inside, VALUE_DIM, VALUE_FIRST, VALUE_REST)
                    acc_rest = tl.dot(weights, value, acc_rest * shrink[:, None], input_precision=PRECISION)
                top = higher

    is_empty = total == 0.0
    top, excess = natural_top(tl.where(is_empty, 0.0, top), unit, IS_BIASED)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(top, sink)
        shrink = tl.exp2((top - higher) * LOG2E + excess)
        total = total * shrink + tl.exp2((sink - higher) * LOG2E)
        acc = acc * shrink[:, None]
        acc_rest = acc_rest * shrink[:, None]
        top, excess = higher, tl.zeros_like(excess)
    total = tl.where(is_empty, 1.0, total)
    norm = (tl.cast(keep_scale, tl.float32) / total)[:, None]
    statistics += first_number(sequence, head.to(tl.int64), query_first, heads, row_h, lengths.cu_seq_q) + row
    tl.store(statistics, tl.where(is_empty, float("-inf"), top), mask=is_row)
    tl.store(statistics + row_kind, tl.where(is_empty, 0.0, tl.log2(total) + excess), mask=is_row)
    is_empty = is_empty[:, None]
    out_head = out.data + sequence * out.b + head.to(tl.int64) * out.h + query_first * out.s
    store_rows(out_head, out, tl.where(is_empty, 0.0, acc * norm), row, is_row, VALUE_DIM, 0, VALUE_FIRST)
    if VALUE_REST > 0:
        rest = tl.where(is_empty, 0.0, acc_rest * norm)
        store_rows(out_head, out, rest, row, is_row, VALUE_DIM, VALUE_FIRST, VALUE_REST)


def attention_forward(tape: Tape, call: Attention, output: Tensor, statistics: Tensor) -> None:
    """Fills the results of `call`, of any length. One launch."""
    tiles = launch.attention_forward(*problem(tape, call))
    blocks = -(-call.max_q // tiles.block_queries)
    tape.launch(
        attention_forward_kernel, (blocks * call.sequences * call.heads,), tiles.options,
        **common_arguments(attention_forward_kernel, call), sinks=call.sinks, out=heads_of(output),
        statistics=statistics, tiles=blocks, IS_WIDE=is_wide(call.dims[0]),
        TILE=(tiles.block_queries, tiles.block_keys),
    )  # fmt: skip


def is_wide(dim: int) -> bool:
    """Whether q is too wide for the registers, beside acc."""
    return dim > 192
