"""Attention of any length, forward: one pass over the keys, softmax on the fly.

(Dao et al., "FlashAttention", NeurIPS 2022, algorithm 1, with the loops exchanged as in "FlashAttention-2", 2023,
section 3.1; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.) For a tile of queries, over the
tiles of keys, with the scores s of tfm.kernels.attention.scores:

    top' = max(top, max(s))      p = exp(s - top')      sum = sum · exp(top - top') + Σ p
    acc = acc · exp(top - top') + dropout(p) v

and at the end out = acc / sum, and top and log2 sum apart. A sink is one more score, of a key without a value. A query
without keys has sum 0: its output is 0 and its top -inf, sink or not.

Programs share the keys of few queries, each some tiles of them, and leave their sums to a second launch
(tfm.kernels.attention.combine).

Read: q once, k and v once for each tile of queries that sees them (from the second-level cache after the first), a bit
for each element of a dense mask. Written: out and two numbers a row. Tiles of keys that length and window exclude are
not touched; tiles that every query sees whole have a loop of their own without a mask.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import VARYING, common_arguments, problem
from tfm.kernels.attention.combine import Pieces, combine_pieces
from tfm.kernels.attention.heads import head_of, heads_of, load_rows, products_of, store_rows, sums_of
from tfm.kernels.attention.scores import finish_rows, rows_of, scores_of, store_statistics, unit_of
from tfm.kernels.attention.visible import (
    allowed_tile,
    edge_tile,
    first_position,
    locate,
    reached,
    share_of,
    valid_span,
    visible_tiles,
    word_rows,
)
from tfm.kernels.launch.attention import any_length as launch
from tfm.kernels.launch.attention import splits as split_launch
from tfm.kernels.philox import keep_tile
from tfm.kernels.softmax import binary, power, shrinkage
from tfm.kernels.splits import store_piece
from tfm.kernels.tape import Tape
from tfm.operators.attention import Attention


@triton.jit(do_not_specialize=[*VARYING, "tiles", "splits"])
def attention_forward_kernel(
    q, k, v, bias, out, statistics, pieces, mask, lengths, window, score, dropout,
    heads, group, query_size, key_size, row_words, row_kind, tiles, splits, start, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, IS_WIDE: tl.constexpr, TILE: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
):  # fmt: skip
    """Each program attends with BLOCK_QUERIES queries of one (sequence, head); a head's last queries go first.

    `pieces` None: to all keys; else each of the `splits` programs to SPLIT_TILES tiles of them, and `out` takes sums.
    """
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    OCTETS: tl.constexpr = TILE[2]
    program = tl.program_id(0)
    if pieces is not None:
        split, program = program % splits, program // splits
    if VALUE_DIMS[3] == 1:
        part: tl.constexpr = 0
    else:
        part, program = program % VALUE_DIMS[3], program // VALUE_DIMS[3]
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
    wide_head, key_head = head.to(tl.int64), (head // group).to(tl.int64)
    q_head = head_of(q, sequence, wide_head, query_first)
    k_head = head_of(k, sequence, key_head, key_first)
    v_head = head_of(v, sequence, key_head, key_first)
    words = word_rows(mask, sequence, wide_head, heads, query_size, row_words)

    if DIMS[3] == 1:
        query = load_rows(q_head, q, row, is_row, DIMS, 0)
    if DIMS[2] > 0:
        query_rest = load_rows(q_head, q, row, is_row, DIMS, 1)
    unit = unit_of(score)
    is_turned = unit < 0
    if not IS_WIDE:
        # A negative scale turns q around, once, so that the largest product has the largest score. What has been
        # computed with stays in registers on sm_90, where it halves what products read of shared memory.
        query = tl.where(is_turned, -query, query)
        if DIMS[2] > 0:
            query_rest = tl.where(is_turned, -query_rest, query_rest)
    unit = tl.abs(unit)
    IS_BIASED: tl.constexpr = bias is not None or score.relative_bias is not None
    scale = 1.0 if IS_BIASED else binary(unit)

    top = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    acc = sums_of(BLOCK_QUERIES, VALUE_DIMS, 0)
    acc_rest = sums_of(BLOCK_QUERIES, VALUE_DIMS, 1)
    if mask.keys is not None:
        valid_begin, key_length = valid_span(mask, sequence, key_size, key_length)
    begin, end, first, whole_first, whole_last, last = visible_tiles(
        first_row, last_row, position, window.left, window.right, key_length, BLOCK_KEYS
    )
    if mask.keys is not None:
        # Padding on the left costs as little as behind the last key.
        begin, first = tl.maximum(begin, valid_begin), tl.minimum(tl.maximum(first, valid_begin // BLOCK_KEYS), last)
    if pieces is not None:
        first, whole_first, whole_last, last = share_of(split, first, whole_first, whole_last, last, SPLIT_TILES)
    # A mask as bits may have a hole anywhere; of a float mask -inf is added there.
    IS_MASKED: tl.constexpr = words is not None or mask.keys is not None or (mask.reach is not None and bias is None)
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
                if mask.reach is not None or mask.keys is not None:
                    bits = reached(mask, sequence, wide_head, heads, column, column < key_length, row_words, key_size)
                    inside = bits & inside if edge else bits

                if DIMS[3] > 1:
                    products = products_of(q_head, q, row, is_row, k_head, k, column, inside, DIMS, PRECISION)
                else:
                    key = load_rows(k_head, k, column, inside, DIMS, 0)
                    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                if DIMS[2] > 0:
                    key = load_rows(k_head, k, column, inside, DIMS, 1)
                    products = tl.dot(query_rest, tl.trans(key), products, input_precision=PRECISION)
                if IS_WIDE:
                    products *= tl.where(is_turned, -1.0, 1.0)
                scores, _ = scores_of(
                    products, score, unit, bias, sequence, wide_head, row[:, None], column[None, :], position,
                    is_row[:, None] & (column < key_length)[None, :],
                )  # fmt: skip
                if edge:
                    seen = column < key_length
                    if mask.keys is not None or (mask.reach is not None and words is None):
                        seen &= inside
                    allowed = allowed_tile(
                        seen, row, column, is_row, position, window, words, key_tile * BLOCK_KEYS, row_words,
                        BLOCK_KEYS, KEYS_ARE_ROWS=False,
                    )  # fmt: skip
                    scores = tl.where(allowed, scores, float("-inf"))

                higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
                shift = higher
                if edge or IS_BIASED:
                    shift = tl.where(higher == float("-inf"), 0.0, higher)
                weights = power(scores, shift[:, None], scale, IS_BIASED)
                shrink = shrinkage(top, shift, IS_BIASED)
                total = total * shrink + tl.sum(weights, axis=1)
                acc = acc * shrink[:, None]
                if dropout.seed is not None:
                    keep = keep_tile(
                        row[:, None], key_tile * BLOCK_KEYS, sequence * heads + head, site, dropout.seed,
                        dropout.threshold, BLOCK_KEYS, OCTETS,
                    )  # fmt: skip
                    weights = tl.where(keep, weights, 0.0)
                weights = weights.to(v.data.dtype.element_ty)
                value = load_rows(v_head, v, column, inside, VALUE_DIMS, part)
                acc = tl.dot(weights, value, acc, input_precision=PRECISION)
                if VALUE_DIMS[2] > 0:
                    value = load_rows(v_head, v, column, inside, VALUE_DIMS, 1)
                    acc_rest = tl.dot(weights, value, acc_rest * shrink[:, None], input_precision=PRECISION)
                top = higher

    # Where rows lie is told in both branches: before them, the assembler waits for every product of some rows.
    if pieces is None:
        is_empty, top, log_sum, norm = finish_rows(top, total, unit, score, head, dropout.keep_scale, IS_BIASED)
        place = rows_of(sequence, wide_head, query_first, heads, query_size, row_kind, lengths.cu_seq_q) + row
        store_statistics(statistics + place, row_kind, top, log_sum, is_row & (part == 0))
        out_head = head_of(out, sequence, wide_head, query_first)
        is_empty, norm = is_empty[:, None], norm[:, None]
        store_rows(out_head, out, tl.where(is_empty, 0.0, acc * norm), row, is_row, VALUE_DIMS, part)
        if VALUE_DIMS[2] > 0:
            store_rows(out_head, out, tl.where(is_empty, 0.0, acc_rest * norm), row, is_row, VALUE_DIMS, 1)
    else:
        place = rows_of(sequence, wide_head, query_first, heads, query_size, row_kind, lengths.cu_seq_q) + row
        store_piece(pieces, place * splits + split, top, total, is_row & (part == 0))
        store_rows(out.data + split * VALUE_DIMS[0], out, acc, place, is_row, VALUE_DIMS, part)
        if VALUE_DIMS[2] > 0:
            store_rows(out.data + split * VALUE_DIMS[0], out, acc_rest, place, is_row, VALUE_DIMS, 1)


def attention_forward(tape: Tape, call: Attention, output: Tensor, statistics: Tensor) -> None:
    """Fills the results of `call`, of any length. One launch; two where programs share keys."""
    seen = most_seen(call)
    shared = split_launch.split_forward(call.max_q, seen, *call.dims, call.query.dtype)
    tiles = launch.attention_forward(*problem(tape, call)) if shared is None else shared
    if call.relative_bias is not None:
        # Addresses by distance take more registers than a cap leaves.
        tiles = replace(tiles, max_registers=None)
    pieces = None if shared is None else Pieces.of(tape, call, shared.splits(seen, call.max_k))
    blocks, splits = -(-call.max_q // tiles.block_queries), 1 if pieces is None else pieces.splits
    arguments = common_arguments(attention_forward_kernel, call, with_sink=pieces is None)
    programs = blocks * call.sequences * call.heads * splits * arguments["VALUE_DIMS"][3]
    tape.launch(
        attention_forward_kernel, (programs,), tiles.options, **arguments,
        out=heads_of(output) if pieces is None else pieces.heads, statistics=statistics,
        pieces=None if pieces is None else pieces.sums, tiles=blocks, splits=splits, IS_WIDE=is_wide(call.dims[0]),
        TILE=tiles.tile, SPLIT_TILES=0 if shared is None else shared.tiles,
    )  # fmt: skip
    if pieces is not None:
        combine_pieces(tape, call, pieces, output, statistics)


def most_seen(call: Attention) -> int:
    """Returns the most keys that the queries of a tile see."""
    if call.left is None or call.right is None:
        return call.max_k
    return min(call.max_k, call.left + call.right + call.max_q)


def is_wide(dim: int) -> bool:
    """Tells whether q is too wide to stand in registers beside acc."""
    return dim > 192
