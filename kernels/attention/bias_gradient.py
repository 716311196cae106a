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

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_rows
from tfm.kernels.attention.heads import head_of, heads_of, products_of
from tfm.kernels.attention.scores import add_bias, bend, load_statistics, rows_of, unit_of
from tfm.kernels.attention.visible import Window, allowed_tile, first_position, locate, reached, visible, word_rows
from tfm.kernels.launch.attention import scores as launch
from tfm.kernels.philox import keep_mask
from tfm.kernels.softmax import exponent
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionBackward

COUNTS = ("splits", "members", "bias_heads", "bias_sequences")


@triton.jit(do_not_specialize=[*VARYING, *COUNTS])
def bias_gradient_kernel(
    q, k, v, bias, dout, statistics, delta, dbias, mask, lengths, window, score, dropout,
    heads, group, query_size, key_size, row_words, row_kind, splits, members, bias_heads, bias_sequences, start, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
    SHARED_HEADS: tl.constexpr, SHARED_QUERIES: tl.constexpr,
):  # fmt: skip
    """Each program sums a share of a tile's `members`: every (sequence, head, tile of queries) that it serves."""
    BLOCK_QUERIES: tl.constexpr = TILE[0]
    BLOCK_KEYS: tl.constexpr = TILE[1]
    query_tiles, key_tiles = tl.cdiv(query_size, BLOCK_QUERIES), tl.cdiv(key_size, BLOCK_KEYS)
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
    bias_rows = head_of(bias, bias_sequence.to(tl.int64), bias_head.to(tl.int64), 0)
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
        begin, end = visible(0, query_size - 1, position, window.left, window.right, key_length)
        inside = (column >= begin) & (column < end)
        if mask.reach is not None:
            inside &= reached(mask, sequence, head, heads, column, inside, row_words)

        key_head = head // group
        q_head, k_head = head_of(q, sequence, head, 0), head_of(k, sequence, key_head, 0)
        products = products_of(q_head, q, row, is_row, k_head, k, column, inside, DIMS, PRECISION)
        dout_head, v_head = head_of(dout, sequence, head, 0), head_of(v, sequence, key_head, 0)
        d_weights = products_of(dout_head, dout, row, is_row, v_head, v, column, inside, VALUE_DIMS, PRECISION)

        of_row = rows_of(sequence, head, 0, heads, query_size, row_kind, None) + row
        top, log_sum = load_statistics(statistics + of_row, row_kind, is_row)
        difference = tl.load(delta + of_row, mask=is_row, other=0.0)
        x, _ = bend(products, score)
        scores = add_bias(x, unit_of(score), added)
        first_column = key_tile * BLOCK_KEYS
        words = word_rows(mask, sequence, head, heads, query_size, row_words)
        allowed = allowed_tile(
            inside, row, column, is_row, position, window, words, first_column, row_words, BLOCK_KEYS,
            KEYS_ARE_ROWS=False,
        )  # fmt: skip
        most = tl.where(allowed, 0.0, float("-inf"))
        weights = tl.exp2(exponent(scores, 1.0, top[:, None], log_sum[:, None], most, IS_FORMED=True))
        if dropout.seed is not None:
            group_of = sequence * heads + head
            keep = keep_mask(row[:, None], first_column, group_of, site, dropout.seed, dropout.threshold, BLOCK_KEYS)
            d_weights = tl.where(keep, d_weights * tl.cast(dropout.keep_scale, tl.float32), 0.0)
        acc += weights * (d_weights - difference[:, None])

    place = (split.to(tl.int64) * bias_sequences + bias_sequence) * bias_heads + bias_head
    if SHARED_QUERIES:
        address = dbias + place * key_size + column[None, :]
        tl.store(address, tl.sum(acc, axis=0, keep_dims=True), mask=is_column[None, :])
    else:
        address = dbias + (place * query_size + row)[:, None] * key_size + column[None, :]
        tl.store(address, acc, mask=(row < query_size)[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["splits", "size"])
def sum_splits_kernel(partials, dbias, splits, size, BLOCK: tl.constexpr):
    """Each program sums BLOCK columns of partials [splits, size]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partials + tl.cast(split, tl.int64) * size + place, mask=place < size, other=0.0)
    tl.store(dbias + place, total, mask=place < size)


def bias_gradient(tape: Tape, call: AttentionBackward, delta: Tensor, dbias: Tensor) -> None:
    """Fills dbias, of the shape of the bias. One launch, two where the bias is small, and a copy if dbias is not dense.

    Args:
        tape: see tfm.kernels.tape.
        call: padded, with a bias.
        delta: Σ dout · out - dlse, laid out as the statistics.
        dbias: what is filled.
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
    dense, size = dbias, dbias.numel()
    if not dbias.is_contiguous():
        dense = tape.empty(dbias.shape, dbias.dtype, dbias.device)
    sums = dense if splits == 1 else tape.empty((splits, size), torch.float32, dbias.device)
    tape.launch(
        bias_gradient_kernel, (places * splits,), tiles.options,
        **common_arguments(bias_gradient_kernel, attention, whole=True)
        | {"window": Window.closed(call.left, call.right)},
        statistics=dense_rows(attention, call.statistics), delta=delta, dout=heads_of(call.dout), dbias=sums,
        splits=splits, members=members, bias_heads=dbias.shape[1], bias_sequences=dbias.shape[0],
        TILE=(tiles.block_queries, tiles.block_keys), SHARED_HEADS=shared_heads, SHARED_QUERIES=shared_queries,
    )  # fmt: skip
    if splits > 1:
        block = 1024
        tape.launch(
            sum_splits_kernel, (-(-size // block),), {"num_warps": 4},
            partials=sums, dbias=dense, splits=splits, size=size, BLOCK=block,
        )  # fmt: skip
    if dense is not dbias:
        dbias.copy_(dense)
