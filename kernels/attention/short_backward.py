"""Attention over at most a few hundred keys, backward: dq, dk and dv of a (sequence, key head) by one program.

With the scores s, the weights p and the dropout mask of the forward, all formed again:

    dv = dropout(p)ᵀ dout      dp = dropout(dout vᵀ)              delta = Σ p · dp - dlse
    ds = p · (dp - delta)      dk = scale · (ds · slope)ᵀ q       dq = scale · (ds · slope) k
    dsink = -Σ p_sink · delta

(Dao et al., "FlashAttention", NeurIPS 2022, appendix B.4. Σ p · dp, over all keys, is their Σ dout · out, without the
rounding of out, and out is not read. The last term of delta is the gradient of lse.)

All keys and values of a key head lie on chip, and so do the sums dk and dv, while the queries of its group's heads pass
by. A query meets all its keys at once, so its dq is finished at once: no atomics, no partial sums, one launch and the
five products of a tile. Tiles have keys as rows, as dk and dv have: p and ds then are the first factors of their
products as they lie in registers. Where dk and dv do not fit beside each other, a second launch makes dv: six products.

Read: q, k, v, dout and two numbers a row once. Written: dq, dk and dv. So seven matrices pass, where the two kernels
for longer sequences pass twelve.
"""

from __future__ import annotations

from typing import Any

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
)
from tfm.kernels.attention.scores import (
    add_bias,
    bend,
    column_bits,
    first_number,
    first_position,
    is_allowed,
    load_rows,
    load_statistics,
    locate,
    mask_tile,
    store_rows,
    sum_sinks,
    unit_of,
    visible_keys,
    words_of,
)
from tfm.kernels.launch.attention import short as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import exponent
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionBackward, row_statistics


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def short_attention_backward_kernel(
    q, k, v, bias, dout, dq, dk, dv, words, reach, sinks, seed, lengths, statistics, dlse, delta, sink_partials,
    words_b, words_h, words_s, reach_b, reach_h, dlse_b, dlse_h, dlse_s, row_kind, row_h,
    heads, group, query_size, key_size, tiles, start, left, right, score, threshold, keep_scale, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program finishes one (sequence, key head)."""
    DIM: tl.constexpr = DIMS[0]
    BLOCK_DIM: tl.constexpr = DIMS[1]
    VALUE_DIM: tl.constexpr = VALUE_DIMS[0]
    BLOCK_VALUE_DIM: tl.constexpr = VALUE_DIMS[1]
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    key_heads = heads // group
    sequence, key_head = (tl.program_id(0) // key_heads).to(tl.int64), tl.program_id(0) % key_heads
    query_first, query_length = locate(sequence, lengths.cu_seq_q, None, query_size)
    key_first, key_length = locate(sequence, lengths.cu_seq_k, lengths.key_lengths, key_size)
    # Behind its length a padded sequence has keys, too, and their gradients are 0.
    key_rows = key_length if lengths.cu_seq_k is not None else tl.cast(key_size, tl.int32)
    position = first_position(sequence, lengths.starts, start)
    wide_key_head = key_head.to(tl.int64)
    q_head = q.data + sequence * q.b + query_first * q.s
    k_head = k.data + sequence * k.b + wide_key_head * k.h + key_first * k.s
    v_head = v.data + sequence * v.b + wide_key_head * v.h + key_first * v.s
    dout_head = dout.data + sequence * dout.b + query_first * dout.s
    unit = unit_of(score)
    IS_BIASED: tl.constexpr = bias is not None
    scale = tl.cast(score.scale, tl.float32)

    column = tl.arange(0, BLOCK_KEYS)
    begin, end = visible_keys(0, query_length - 1, position, left, right, key_length)
    inside = (column >= begin) & (column < end)
    if reach is not None:
        reached = column < 0
        for member in range(group):
            head_reach = reach + sequence * reach_b + (key_head * group + member).to(tl.int64) * reach_h
            reached |= column_bits(head_reach, column, inside)
        inside &= reached
    key = load_rows(k_head, k, column, inside, DIM, 0, BLOCK_DIM)
    value = load_rows(v_head, v, column, inside, VALUE_DIM, 0, BLOCK_VALUE_DIM)
    d_key = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    d_value = tl.zeros([BLOCK_KEYS, BLOCK_VALUE_DIM], tl.float32)

    # One loop for the group's heads and their tiles: two, one in the other, take more registers.
    own_tiles = tl.cdiv(query_length, BLOCK_QUERIES)
    for step in tl.range(0, group * own_tiles, num_stages=1):
        tile = step % own_tiles
        head = key_head * group + step // own_tiles
        wide_head = head.to(tl.int64)
        row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        is_row = row < query_length
        head_rows = first_number(sequence, wide_head, query_first, heads, row_h, lengths.cu_seq_q)
        top, log_sum = load_statistics(statistics + head_rows + row, row_kind, is_row)
        has_keys = top < float("inf")
        # Under a mask a query without keys may hold anything; elsewhere the loads need not wait for the statistics.
        inside_row = has_keys if reach is not None else is_row
        query = load_rows(q_head + wide_head * q.h, q, row, inside_row, DIM, 0, BLOCK_DIM)
        d_out = load_rows(dout_head + wide_head * dout.h, dout, row, inside_row, VALUE_DIM, 0, BLOCK_VALUE_DIM)

        products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        scores, slope = bend(products, score)
        if bias is not None:
            bias_tile = bias.data + sequence * bias.b + wide_head * bias.h
            address = bias_tile + row.to(tl.int64)[None, :] * bias.s + column.to(tl.int64)[:, None] * bias.d
            scores = add_bias(scores, unit, address, is_row[None, :] & (column < key_length)[:, None])
        allowed = inside[:, None]
        if left is not None or right is not None:
            allowed &= is_allowed(row[None, :], column[:, None], position, left, right, key_length)
        if words is not None:
            head_words = words_of(words, sequence, wide_head, words_b, words_h)
            allowed &= tl.trans(mask_tile(head_words, row, words_s, is_row, 0, BLOCK_KEYS))
        elif reach is not None and bias is None:
            # A mask with one row for all queries is its own reach, each head's its own.
            head_reach = reach + sequence * reach_b + wide_head * reach_h
            allowed &= column_bits(head_reach, column, inside)[:, None]
        most = tl.where(allowed, 0.0, float("-inf"))
        weights = tl.exp2(exponent(scores, unit, top[None, :], log_sum[None, :], most, IS_BIASED))
        d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        kept = weights
        if seed is not None:
            keep = tl.trans(keep_mask(row[:, None], 0, sequence * heads + head, site, seed, threshold, BLOCK_KEYS))
            kept = tl.where(keep, weights, 0.0)
            d_weights = tl.where(keep, d_weights * tl.cast(keep_scale, tl.float32), 0.0)
        if reach is not None:
            # Another head's mask may leave NaN to this one.
            d_weights = tl.where(weights == 0.0, 0.0, d_weights)
        if dv is not None:
            d_value = tl.dot(kept.to(v.data.dtype.element_ty), d_out, d_value, input_precision=PRECISION)
        difference = tl.sum(weights * d_weights, axis=0)
        if dlse is not None:
            address = dlse + sequence * dlse_b + wide_head * dlse_h + (query_first + row) * dlse_s
            difference -= tl.load(address, mask=inside_row, other=0.0)
        d_scores = (weights * (d_weights - difference[None, :]) * slope).to(k.data.dtype.element_ty)
        if dk is not None:
            d_key = tl.dot(d_scores, query, d_key, input_precision=PRECISION)

        if dq is not None:
            # Hopper's tensor cores take 64 rows: the head dim, where keys are so many, never the queries.
            if BLOCK_KEYS >= 64:
                d_query = tl.trans(tl.dot(tl.trans(key), d_scores, input_precision=PRECISION))
            else:
                d_query = tl.dot(tl.trans(d_scores), key, input_precision=PRECISION)
            head_dq = dq.data + sequence * dq.b + wide_head * dq.h + query_first * dq.s
            store_rows(head_dq, dq, d_query * scale, row, is_row, DIM, 0, BLOCK_DIM)
        if delta is not None:
            tl.store(delta + head_rows + row, difference, mask=is_row)
        if sink_partials is not None:
            sink = tl.load(sinks + head).to(tl.float32)
            share = tl.exp2(exponent(sink, 1.0, top, log_sum, 0.0, IS_FORMED=True)) * difference
            # As a matrix: Triton 3.7 cannot sum a vector beside sm_100's tensor memory.
            share = tl.sum(tl.where(has_keys, -share, 0.0)[None, :], axis=1)
            partial = sink_partials + (sequence * tiles + tile) * heads + head
            tl.store(partial + tl.arange(0, 1), share)

    is_key = column < key_rows
    if dk is not None:
        head_dk = dk.data + sequence * dk.b + wide_key_head * dk.h + key_first * dk.s
        store_rows(head_dk, dk, d_key * scale, column, is_key, DIM, 0, BLOCK_DIM)
    if dv is not None:
        head_dv = dv.data + sequence * dv.b + wide_key_head * dv.h + key_first * dv.s
        d_value *= tl.cast(keep_scale, tl.float32)
        store_rows(head_dv, dv, d_value, column, is_key, VALUE_DIM, 0, BLOCK_VALUE_DIM)


def short_attention_backward(
    tape: Tape, call: AttentionBackward, tiles: launch.ShortBackwardTiles, dquery: Tensor | None, dkey: Tensor | None,
    dvalue: Tensor | None, dsinks: Tensor | None, want_delta: bool,
) -> Tensor | None:  # fmt: skip
    """Fills the gradients that are given, at these tiles, those that the launch settings have; `tiles.passes` launches.

    Returns:
        delta, laid out as the statistics, which serves tfm.kernels.attention.bias_gradient; None where not wanted.
    """
    attention = call.attention
    statistics = dense_statistics(attention, call.statistics)
    delta = row_statistics(call.query)[0] if want_delta else None
    blocks = -(-call.max_q // tiles.block_queries)
    sink_partials = None
    if dsinks is not None:
        # Tiles behind a packed sequence's end write nothing.
        sink_partials = tape.zeros((attention.sequences * blocks, attention.heads), torch.float32, call.query.device)
    first: dict[str, Any] = {"dq": heads_of(dquery), "dk": heads_of(dkey)}
    second: dict[str, Any] = {"dv": heads_of(dvalue), "delta": delta, "sink_partials": sink_partials}
    passes = [first | second] if tiles.passes == 1 else [first | dict.fromkeys(second), dict.fromkeys(first) | second]
    for results in passes:
        if all(result is None for result in results.values()):
            continue
        tape.launch(
            short_attention_backward_kernel, (attention.sequences * attention.key_heads,), tiles.options,
            **common_arguments(short_attention_backward_kernel, attention, whole=True), **results,
            sinks=None if results["sink_partials"] is None else call.sinks, statistics=statistics,
            dout=heads_of(call.dout), dlse=call.dlse, **dlse_strides(call.dlse), tiles=blocks,
            TILE=(tiles.block_queries, tiles.block_keys),
        )  # fmt: skip
    if sink_partials is not None and dsinks is not None:
        sum_sinks(sink_partials, dsinks)
    return delta
