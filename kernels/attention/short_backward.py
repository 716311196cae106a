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

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels import launch
from tfm.kernels.attention.arguments import (
    VARYING,
    common_arguments,
    dlse_strides,
    statistics_strides,
    strides,
)
from tfm.kernels.attention.scores import (
    add_bias,
    bend,
    column_bits,
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
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import exponent
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionBackward, row_statistics


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def short_attention_backward_kernel(
    q, k, v, bias, words, reach, sinks, seed, cu_seq_q, cu_seq_k, key_lengths, starts, statistics, dout, dlse,
    dq, dk, dv, delta, sink_partials,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, row_kind, row_b, row_h,
    dout_b, dout_h, dout_s, dout_d, dlse_b, dlse_h, dlse_s, dq_b, dq_h, dq_s, dq_d, dk_b, dk_h, dk_s, dk_d,
    dv_b, dv_h, dv_s, dv_d,
    bias_b, bias_h, bias_s, bias_k, words_b, words_h, words_s, reach_b, reach_h,
    heads, group, query_size, key_size, tiles, start, left, right, inner, outer, scale, threshold, keep_scale, site,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Each program finishes one (sequence, key head)."""
    key_heads = heads // group
    sequence, key_head = (tl.program_id(0) // key_heads).to(tl.int64), tl.program_id(0) % key_heads
    query_first, query_length = locate(sequence, cu_seq_q, None, query_size)
    key_first, key_length = locate(sequence, cu_seq_k, key_lengths, key_size)
    # Behind its length a padded sequence has keys, too, and their gradients are 0.
    key_rows = key_length if cu_seq_k is not None else tl.cast(key_size, tl.int32)
    position = first_position(sequence, starts, start)
    wide_key_head = key_head.to(tl.int64)
    q += sequence * q_b + query_first * q_s
    k += sequence * k_b + wide_key_head * k_h + key_first * k_s
    v += sequence * v_b + wide_key_head * v_h + key_first * v_s
    dout += sequence * dout_b + query_first * dout_s
    statistics += sequence * row_b + query_first
    unit = unit_of(inner, outer)
    IS_BIASED: tl.constexpr = bias is not None
    scale = tl.cast(scale, tl.float32)

    column = tl.arange(0, BLOCK_KEYS)
    begin, end = visible_keys(0, query_length - 1, position, left, right, key_length)
    inside = (column >= begin) & (column < end)
    if reach is not None:
        reached = column < 0
        for member in range(group):
            head_reach = reach + sequence * reach_b + (key_head * group + member).to(tl.int64) * reach_h
            reached |= column_bits(head_reach, column, inside)
        inside &= reached
    key = load_rows(k, column, k_s, k_d, inside, DIM, 0, BLOCK_DIM)
    value = load_rows(v, column, v_s, v_d, inside, VALUE_DIM, 0, BLOCK_VALUE_DIM)
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
        top, log_sum = load_statistics(statistics + wide_head * row_h + row, row_kind, is_row)
        has_keys = top < float("inf")
        # Under a mask a query without keys may hold anything; elsewhere the loads need not wait for the statistics.
        inside_row = has_keys if reach is not None else is_row
        query = load_rows(q + wide_head * q_h, row, q_s, q_d, inside_row, DIM, 0, BLOCK_DIM)
        d_out = load_rows(dout + wide_head * dout_h, row, dout_s, dout_d, inside_row, VALUE_DIM, 0, BLOCK_VALUE_DIM)

        products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        scores, slope = bend(products, inner, outer)
        if bias is not None:
            bias_tile = bias + sequence * bias_b + wide_head * bias_h
            address = bias_tile + row.to(tl.int64)[None, :] * bias_s + column.to(tl.int64)[:, None] * bias_k
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
            d_value = tl.dot(kept.to(v.dtype.element_ty), d_out, d_value, input_precision=PRECISION)
        difference = tl.sum(weights * d_weights, axis=0)
        if dlse is not None:
            address = dlse + sequence * dlse_b + wide_head * dlse_h + (query_first + row) * dlse_s
            difference -= tl.load(address, mask=inside_row, other=0.0)
        d_scores = (weights * (d_weights - difference[None, :]) * slope).to(k.dtype.element_ty)
        if dk is not None:
            d_key = tl.dot(d_scores, query, d_key, input_precision=PRECISION)

        if dq is not None:
            # Hopper's tensor cores take 64 rows: the head dim, where keys are so many, never the queries.
            if BLOCK_KEYS >= 64:
                d_query = tl.trans(tl.dot(tl.trans(key), d_scores, input_precision=PRECISION))
            else:
                d_query = tl.dot(tl.trans(d_scores), key, input_precision=PRECISION)
            head_dq = dq + sequence * dq_b + wide_head * dq_h + query_first * dq_s
            store_rows(head_dq, d_query * scale, row, dq_s, dq_d, is_row, DIM, 0, BLOCK_DIM)
        if delta is not None:
            place = delta + sequence * row_b + wide_head * row_h + query_first + row
            tl.store(place, difference, mask=is_row)
        if sink_partials is not None:
            sink = tl.load(sinks + head).to(tl.float32)
            share = tl.exp2(exponent(sink, 1.0, top, log_sum, 0.0, IS_FORMED=True)) * difference
            # As a matrix: Triton 3.7 cannot sum a vector beside sm_100's tensor memory.
            share = tl.sum(tl.where(has_keys, -share, 0.0)[None, :], axis=1)
            partial = sink_partials + (sequence * tiles + tile) * heads + head
            tl.store(partial + tl.arange(0, 1), share)

    is_key = column < key_rows
    if dk is not None:
        head_dk = dk + sequence * dk_b + wide_key_head * dk_h + key_first * dk_s
        store_rows(head_dk, d_key * scale, column, dk_s, dk_d, is_key, DIM, 0, BLOCK_DIM)
    if dv is not None:
        head_dv = dv + sequence * dv_b + wide_key_head * dv_h + key_first * dv_s
        d_value *= tl.cast(keep_scale, tl.float32)
        store_rows(head_dv, d_value, column, dv_s, dv_d, is_key, VALUE_DIM, 0, BLOCK_VALUE_DIM)


def short_attention_backward(
    tape: Tape, call: AttentionBackward, tiles: launch.ShortBackwardTiles, dquery: Tensor | None, dkey: Tensor | None,
    dvalue: Tensor | None, dsinks: Tensor | None, want_delta: bool,
) -> Tensor | None:  # fmt: skip
    """Fills the gradients that are given, at these tiles, those that the launch settings have; `tiles.passes` launches.

    Returns:
        delta, laid out as the statistics, which serves tfm.kernels.attention.bias_gradient; None where not wanted.
    """
    attention, statistics = call.attention, call.statistics
    delta = row_statistics(call.query)[0] if want_delta else None
    blocks = -(-call.max_q // tiles.block_queries)
    sink_partials = None
    if dsinks is not None:
        # Tiles behind a packed sequence's end write nothing.
        sink_partials = tape.zeros((attention.sequences * blocks, attention.heads), torch.float32, call.query.device)
    first, second = {"dq": dquery, "dk": dkey}, {"dv": dvalue, "delta": delta, "sink_partials": sink_partials}
    passes = [first | second] if tiles.passes == 1 else [first | dict.fromkeys(second), dict.fromkeys(first) | second]
    for results in passes:
        if all(result is None for result in results.values()):
            continue
        tape.launch(
            short_attention_backward_kernel, (attention.sequences * attention.key_heads,), tiles.options,
            **common_arguments(short_attention_backward_kernel, attention), **results,
            sinks=None if results["sink_partials"] is None else call.sinks,
            statistics=statistics, dout=call.dout, dlse=call.dlse,
            **strides("dout", call.dout), **strides("dq", dquery), **strides("dk", dkey), **strides("dv", dvalue),
            **statistics_strides(statistics), **dlse_strides(call.dlse), tiles=blocks,
            BLOCK_QUERIES=tiles.block_queries, BLOCK_KEYS=tiles.block_keys,
        )  # fmt: skip
    if sink_partials is not None and dsinks is not None:
        sum_sinks(sink_partials, dsinks)
    return delta
