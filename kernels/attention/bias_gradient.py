"""The gradient of an additive bias, summed over the dimensions along which it broadcasts.

With the weights p, dp = dropout(dout vᵀ) and the delta of the attention's backward,

    dbias = Σ p · (dp - delta)     over the sequences, heads and queries that share an element

(T5's relative position bias [1, H, Sq, Sk], Raffel et al. 2020, section 2.1, is shared by all sequences of a batch.) A
program keeps one tile of the bias and goes over those that share it, so that nothing of the size [B, H, Sq, Sk] is ever
stored, and no two programs add to one number: the same bits on every run. Where the tiles are too few to fill a GPU,
`splits` programs share a tile's sequences, and a second launch adds their sums, always in the same order.

Read: q, k, v and dout once for each tile, from the second-level cache after the first, as programs pass by the
sequences in step. Written: dbias, and where split at most launch.BIAS_PROGRAMS tiles of partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_statistics, heads_of
from tfm.kernels.attention.scores import (
    as_numbers,
    bend,
    biased,
    column_bits,
    first_number,
    first_position,
    is_allowed,
    load_rows,
    load_statistics,
    locate,
    mask_tile,
    unit_of,
    visible_keys,
    words_of,
)
from tfm.kernels.launch.attention import scores as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import exponent
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionBackward

COUNTS = ("query_tiles", "key_tiles", "splits", "members", "bias_heads")
DBIAS_STEPS = ("dbias_split", "dbias_b", "dbias_h", "dbias_s")


@triton.jit(do_not_specialize=[*VARYING, *COUNTS, *DBIAS_STEPS])
def bias_gradient_kernel(
    q, k, v, bias, dout, words, reach, seed, lengths, statistics, delta, dbias,
    words_b, words_h, words_s, reach_b, reach_h, dbias_split, dbias_b, dbias_h, dbias_s, dbias_k, row_kind, row_h,
    heads, group, query_size, key_size, query_tiles, key_tiles, splits, members, bias_heads,
    start, left, right, score, threshold, keep_scale, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    SHARED_HEADS: tl.constexpr, SHARED_QUERIES: tl.constexpr,
):  # fmt: skip
    """Each program sums a share of a tile's `members`: every (sequence, head, tile of queries) that it serves."""
    DIM: tl.constexpr = DIMS[0]
    BLOCK_DIM: tl.constexpr = DIMS[1]
    VALUE_DIM: tl.constexpr = VALUE_DIMS[0]
    BLOCK_VALUE_DIM: tl.constexpr = VALUE_DIMS[1]
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    program = tl.program_id(0)
    split, place = program % splits, program // splits
    key_tile, place = place % key_tiles, place // key_tiles
    # Of a bias with one row, the tiles of queries are members.
    query_tile = 0
    if not SHARED_QUERIES:
        query_tile, place = place % query_tiles, place // query_tiles
    bias_head, bias_sequence = place % bias_heads, place // bias_heads
    column = key_tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    is_column = column < key_size
    # All members have the same tile of the bias: its strides are 0 where they differ.
    row = query_tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    bias_rows = bias.data + bias_sequence.to(tl.int64) * bias.b + bias_head.to(tl.int64) * bias.h
    address = bias_rows + row.to(tl.int64)[:, None] * bias.s + column.to(tl.int64)[None, :] * bias.d
    added = tl.load(address, mask=(row < query_size)[:, None] & is_column[None, :], other=0.0)

    acc = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
    share = tl.cdiv(members, splits)
    for member in range(split * share, tl.minimum((split + 1) * share, members)):
        rest = member
        if SHARED_QUERIES:
            query_tile, rest = rest % query_tiles, rest // query_tiles
        head = bias_head
        if SHARED_HEADS:
            head, rest = rest % heads, rest // heads
        # A bias of each sequence's own has no other among its members.
        sequence, head = (bias_sequence + rest).to(tl.int64), head.to(tl.int64)
        row = query_tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        _, key_length = locate(sequence, None, lengths.key_lengths, key_size)
        position = first_position(sequence, lengths.starts, start)
        is_row = row < query_size
        begin, end = visible_keys(0, query_size - 1, position, left, right, key_length)
        inside = (column >= begin) & (column < end)
        if reach is not None:
            inside &= column_bits(reach + sequence * reach_b + head * reach_h, column, inside)

        query = load_rows(q.data + sequence * q.b + head * q.h, q, row, is_row, DIM, 0, BLOCK_DIM)
        key = load_rows(k.data + sequence * k.b + head // group * k.h, k, column, inside, DIM, 0, BLOCK_DIM)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        head_v, head_dout = v.data + sequence * v.b + head // group * v.h, dout.data + sequence * dout.b + head * dout.h
        value = load_rows(head_v, v, column, inside, VALUE_DIM, 0, BLOCK_VALUE_DIM)
        d_out = load_rows(head_dout, dout, row, is_row, VALUE_DIM, 0, BLOCK_VALUE_DIM)
        d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)

        of_row = first_number(sequence, head, 0, heads, row_h, None) + row
        top, log_sum = load_statistics(statistics + of_row, row_kind, is_row)
        difference = tl.load(delta + of_row, mask=is_row, other=0.0)
        x, _ = bend(products, score)
        scores = biased(x, unit_of(score), added)
        allowed = inside[None, :]
        allowed &= is_allowed(row[:, None], column[None, :], position, left, right, key_length)
        if words is not None:
            head_words = words_of(words, sequence, head, words_b, words_h)
            allowed &= mask_tile(head_words, row, words_s, is_row, key_tile * BLOCK_KEYS, BLOCK_KEYS)
        most = tl.where(allowed, 0.0, float("-inf"))
        weights = tl.exp2(exponent(scores, 1.0, top[:, None], log_sum[:, None], most, IS_FORMED=True))
        if seed is not None:
            first_column = key_tile * BLOCK_KEYS
            keep = keep_mask(row[:, None], first_column, sequence * heads + head, site, seed, threshold, BLOCK_KEYS)
            d_weights = tl.where(keep, d_weights * tl.cast(keep_scale, tl.float32), 0.0)
        acc += weights * (d_weights - difference[:, None])

    dbias += split.to(tl.int64) * dbias_split + bias_sequence.to(tl.int64) * dbias_b
    dbias += bias_head.to(tl.int64) * dbias_h + column.to(tl.int64)[None, :] * dbias_k
    is_column = is_column[None, :]
    if SHARED_QUERIES:
        tl.store(dbias, tl.sum(acc, axis=0, keep_dims=True), mask=is_column)
    else:
        tl.store(dbias + row.to(tl.int64)[:, None] * dbias_s, acc, mask=(row < query_size)[:, None] & is_column)


@triton.jit(do_not_specialize=["splits", "size"])
def sum_splits_kernel(partials, dbias, splits, size, BLOCK: tl.constexpr):
    """Each program sums BLOCK columns of partials [splits, size]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partials + tl.cast(split, tl.int64) * size + place, mask=place < size, other=0.0)
    tl.store(dbias + place, total, mask=place < size)


def bias_gradient(tape: Tape, call: AttentionBackward, delta: Tensor, dbias: Tensor) -> None:
    """Fills dbias, of the shape of the bias. One launch, two where the bias is small.

    Args:
        tape: see tfm.kernels.tape.
        call: padded, with a bias.
        delta: Σ dout · out - dlse, laid out as the statistics.
        dbias: dense.
    """
    attention = call.attention
    shared_sequences, shared_heads, shared_queries = (size == 1 for size in dbias.shape[:3])
    tiles = launch.bias_gradient(max(attention.dims), call.query.dtype, tape.chip(dbias.device).major)
    query_tiles, key_tiles = -(-call.max_q // tiles.block_queries), -(-call.max_k // tiles.block_keys)
    members = attention.sequences if shared_sequences else 1
    members *= attention.heads if shared_heads else 1
    members *= query_tiles if shared_queries else 1
    places = dbias.shape[0] * dbias.shape[1] * key_tiles * (1 if shared_queries else query_tiles)
    splits = launch.bias_splits(places, members)
    left, right = as_numbers(call.left, call.right)
    sums, steps, size = dbias, dbias.stride(), dbias.numel()
    if splits > 1:
        sums = tape.empty((splits, size), torch.float32, dbias.device)
    tape.launch(
        bias_gradient_kernel, (places * splits,), tiles.options,
        **common_arguments(bias_gradient_kernel, attention, whole=True) | {"left": left, "right": right},
        statistics=dense_statistics(attention, call.statistics), delta=delta, dout=heads_of(call.dout), dbias=sums,
        dbias_split=size,
        **{f"dbias_{dim}": step for dim, step in zip("bhsk", steps, strict=True)},
        query_tiles=query_tiles, key_tiles=key_tiles, splits=splits, members=members, bias_heads=dbias.shape[1],
        TILE=(tiles.block_queries, tiles.block_keys),
        SHARED_HEADS=shared_heads, SHARED_QUERIES=shared_queries,
    )  # fmt: skip
    if splits > 1:
        block = 1024
        tape.launch(
            sum_splits_kernel, (-(-size // block),), {"num_warps": 4},
            partials=sums, dbias=dbias, splits=splits, size=size, BLOCK=block,
        )  # fmt: skip
