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

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_rows
from tfm.kernels.attention.heads import head_of, heads_of, load_rows, store_rows, sums_of
from tfm.kernels.attention.scores import (
    load_statistics,
    rows_of,
    scores_of,
    sink_gradient,
    sink_partials,
    sum_partials,
    unit_of,
)
from tfm.kernels.attention.visible import allowed_tile, first_position, locate, reached, visible, word_rows
from tfm.kernels.launch.attention import short as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import exponent
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionBackward, Gradients, row_statistics


@triton.jit(do_not_specialize=[*VARYING, "tiles"])
def short_attention_backward_kernel(
    q, k, v, bias, dout, dq, dk, dv, statistics, dlse, delta, partials, mask, lengths, window, score, dropout,
    heads, group, query_size, key_size, row_words, row_kind, tiles, start, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program finishes one (sequence, key head)."""
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
    unit = unit_of(score)
    IS_BIASED: tl.constexpr = bias is not None or score.relative_bias is not None
    scale = tl.cast(score.scale, tl.float32)

    column = tl.arange(0, BLOCK_KEYS)
    begin, end = visible(0, query_length - 1, position, window.left, window.right, key_length)
    inside = (column >= begin) & (column < end)
    if mask.reach is not None or mask.keys is not None:
        by_any = column < 0
        for member in range(group):
            head_of_group = (key_head * group + member).to(tl.int64)
            by_any |= reached(mask, sequence, head_of_group, heads, column, inside, row_words, key_size)
        inside &= by_any
    key = load_rows(head_of(k, sequence, wide_key_head, key_first), k, column, inside, DIMS, 0)
    value = load_rows(head_of(v, sequence, wide_key_head, key_first), v, column, inside, VALUE_DIMS, 0)
    d_key = sums_of(BLOCK_KEYS, DIMS, 0)
    d_value = sums_of(BLOCK_KEYS, VALUE_DIMS, 0)

    # One loop for the group's heads and their tiles: two, one in the other, take more registers.
    own_tiles = tl.cdiv(query_length, BLOCK_QUERIES)
    for step in tl.range(0, group * own_tiles, num_stages=1):
        tile = step % own_tiles
        head = key_head * group + step // own_tiles
        wide_head = head.to(tl.int64)
        row = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        is_row = row < query_length
        head_rows = rows_of(sequence, wide_head, query_first, heads, query_size, row_kind, lengths.cu_seq_q)
        top, log_sum = load_statistics(statistics + head_rows + row, row_kind, is_row)
        has_keys = top < float("inf")
        # Under a mask a query without keys may hold anything; elsewhere the loads need not wait for the statistics.
        inside_row = has_keys if mask.reach is not None or mask.keys is not None else is_row
        q_head, dout_head = (
            head_of(q, sequence, wide_head, query_first),
            head_of(dout, sequence, wide_head, query_first),
        )
        query = load_rows(q_head, q, row, inside_row, DIMS, 0)
        d_out = load_rows(dout_head, dout, row, inside_row, VALUE_DIMS, 0)

        products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        scores, slope = scores_of(
            products, score, unit, bias, sequence, wide_head, row[None, :], column[:, None], position,
            is_row[None, :] & (column < key_length)[:, None],
        )  # fmt: skip
        seen = inside
        if mask.keys is not None or (mask.reach is not None and mask.words is None and bias is None):
            # A mask with one row for all queries is its own reach, each head's its own.
            seen = reached(mask, sequence, wide_head, heads, column, inside, row_words, key_size)
        words = word_rows(mask, sequence, wide_head, heads, query_size, row_words)
        allowed = allowed_tile(
            seen, row, column, is_row, position, window, words, 0, row_words, BLOCK_KEYS, KEYS_ARE_ROWS=True
        )
        most = tl.where(allowed, 0.0, float("-inf"))
        weights = tl.exp2(exponent(scores, unit, top[None, :], log_sum[None, :], most, IS_BIASED))
        d_weights = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
        kept = weights
        if dropout.seed is not None:
            group_of = sequence * heads + head
            keep = keep_mask(row[:, None], 0, group_of, site, dropout.seed, dropout.threshold, BLOCK_KEYS)
            keep = tl.trans(keep)
            kept = tl.where(keep, weights, 0.0)
            d_weights = tl.where(keep, d_weights * tl.cast(dropout.keep_scale, tl.float32), 0.0)
        if mask.reach is not None or mask.keys is not None:
            # Another head's mask may leave NaN to this one.
            d_weights = tl.where(weights == 0.0, 0.0, d_weights)
        if dv is not None:
            d_value = tl.dot(kept.to(v.data.dtype.element_ty), d_out, d_value, input_precision=PRECISION)
        difference = tl.sum(weights * d_weights, axis=0)
        if dlse is not None:
            difference -= tl.load(dlse + head_rows + row, mask=inside_row, other=0.0)
        d_scores = (weights * (d_weights - difference[None, :]) * slope).to(k.data.dtype.element_ty)
        if dk is not None:
            d_key = tl.dot(d_scores, query, d_key, input_precision=PRECISION)

        if dq is not None:
            # Hopper's tensor cores take 64 rows: the head dim, where keys are so many, never the queries.
            if BLOCK_KEYS >= 64:
                d_query = tl.trans(tl.dot(tl.trans(key), d_scores, input_precision=PRECISION))
            else:
                d_query = tl.dot(tl.trans(d_scores), key, input_precision=PRECISION)
            dq_head = head_of(dq, sequence, wide_head, query_first)
            store_rows(dq_head, dq, d_query * scale, row, is_row, DIMS, 0)
        if delta is not None:
            tl.store(delta + head_rows + row, difference, mask=is_row)
        if partials is not None:
            share = sink_gradient(score, head, top, log_sum, difference)
            partial = partials + (sequence * tiles + tile) * heads + head
            # As a matrix: Triton 3.7 cannot sum a vector beside sm_100's tensor memory.
            tl.store(partial + tl.arange(0, 1), tl.sum(share[None, :], axis=1))

    is_key = column < key_rows
    if dk is not None:
        dk_head = head_of(dk, sequence, wide_key_head, key_first)
        store_rows(dk_head, dk, d_key * scale, column, is_key, DIMS, 0)
    if dv is not None:
        dv_head = head_of(dv, sequence, wide_key_head, key_first)
        d_value *= tl.cast(dropout.keep_scale, tl.float32)
        store_rows(dv_head, dv, d_value, column, is_key, VALUE_DIMS, 0)


def short_attention_backward(
    tape: Tape, call: AttentionBackward, tiles: launch.ShortBackwardTiles, gradients: Gradients
) -> Tensor | None:
    """Fills all gradients but those of biases, at tiles that the launch settings have; `tiles.passes` launches.

    Returns:
        delta, laid out as the statistics, for the gradients of biases; None where nobody wants one.
    """
    attention = call.attention
    statistics, dlse = dense_rows(attention, call.statistics), dense_rows(attention, call.dlse)
    delta = tape.scratch(row_statistics(call.query)[0]) if gradients.of_biases else None
    blocks = -(-call.max_q // tiles.block_queries)
    partials = sink_partials(tape, call, gradients, blocks)
    first: dict[str, Any] = {"dq": heads_of(gradients.query), "dk": heads_of(gradients.key)}
    second: dict[str, Any] = {"dv": heads_of(gradients.value), "delta": delta, "partials": partials}
    passes = [first | second] if tiles.passes == 1 else [first | dict.fromkeys(second), dict.fromkeys(first) | second]
    for results in passes:
        if all(result is None for result in results.values()):
            continue
        with_sink = results["partials"] is not None
        tape.launch(
            short_attention_backward_kernel, (attention.sequences * attention.key_heads,), tiles.options,
            **common_arguments(short_attention_backward_kernel, attention, whole=True, with_sink=with_sink),
            **results, dout=heads_of(call.dout), statistics=statistics, dlse=dlse, tiles=blocks,
            TILE=(tiles.block_queries, tiles.block_keys),
        )  # fmt: skip
    sum_partials(partials, gradients)
    return delta
