"""Attention of one query a row over a cache of keys and values, in which beams follow their ancestry.

For a query head of row r, over the places t below the row's length,

    s_t = scale · q·k_t      k_t = key_cache[parents[r, t], t]      v_t alike
    out = Σ exp(s_t - top) v_t / Σ exp(s_t - top)                   top = max(s)

by the powers of tfm.kernels.softmax, with the running maximum of FlashAttention (tfm.kernels.attention.forward). The
latest token's key and value, where they are given, are where the sums begin: they are stored into the row's own place
and never read from there. A longer cache is cut into pieces, a program each, which leave their top in base 2, Σ exp and
Σ exp v to a second launch, which adds them up (tfm.kernels.splits).

Read: q, the row's part of `parents`, and each place's key and value once for all query heads that share them; written:
out and the latest key and value. Nothing is gathered beforehand, and no cache is copied when a beam is reordered, which
would read and write all that attention reads. Hypotheses of a sentence share most of their ancestry: 2,048 of them in
beams of 4 with 30 tokens and 8 heads of 64 in bf16 read 126 MB, of which 49 MB are distinct and come from memory, in
11 µs at the speed of a copy on an H200, 4.3 TB/s, and the rest from the second-level cache. 16 rows of 32 heads of 128
and 4,000 keys read 1.05 GB, 244 µs (FlashAttention-3 reaches 1.85 TB/s there on an H100, 55 % of its memory).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.launch import decode_attention as settings
from tfm.kernels.matmul import precision
from tfm.kernels.rows import side_by_side
from tfm.kernels.softmax import binary, fma, power, shrinkage
from tfm.kernels.splits import TOGETHER, add_pieces, store_piece
from tfm.kernels.tape import Tape
from tfm.operators.decode_attention import DecodeAttention


@triton.jit
def split_length(lengths, length_step, row, capacity, HAS_LATEST: tl.constexpr):
    """Returns how many keys a row reads from the cache, and whether it has a latest key besides: int32 and int1."""
    length = tl.minimum(tl.maximum(tl.load(lengths + row * length_step), 0), capacity)
    has_latest = (length > 0) & HAS_LATEST
    return length - has_latest.to(tl.int32), has_latest


@triton.jit(do_not_specialize=["key_heads", "group", "tiles", "splits", "capacity", "cache_rows"])
def decode_attention_kernel(
    q, k, v, k_cache, v_cache, lengths, parents, out, partials, statistics,
    q_row, q_head, k_row, k_head, v_row, v_head, k_cache_row, k_cache_place, k_cache_head,
    v_cache_row, v_cache_place, v_cache_head, length_step, parents_row, parents_place,
    key_heads, group, tiles, splits, capacity, cache_rows, scale,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, SPLIT_KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program takes SPLIT_KEYS keys of one (row, key head), for BLOCK_HEADS query heads of the `group`.

    `partials` None: the keys are all there are, and `out` is written; else their sums.
    """
    program = tl.program_id(0)
    split, tile = program % splits, program // splits % tiles
    key_head = (program // splits // tiles % key_heads).to(tl.int64)
    row = (program // splits // tiles // key_heads).to(tl.int64)
    length, has_latest = split_length(lengths, length_step, row, capacity, k is not None)
    first = split * SPLIT_KEYS
    # The first piece always has a row to write.
    if (split > 0) & (first >= length):
        return

    column, value_column = tl.arange(0, BLOCK_DIM)[None, :], tl.arange(0, BLOCK_VALUE_DIM)[None, :]
    member = tile * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    is_head = member < group
    head = key_head * group + member
    query = tl.load(q + row * q_row + head * q_head + column, mask=is_head & (column < DIM), other=0.0)
    # So that the largest product has the largest score.
    scale = tl.cast(scale, tl.float32)
    query = tl.where(scale < 0, -query, query)
    unit = binary(tl.abs(scale))

    top = tl.full([BLOCK_HEADS, 1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS, 1], tl.float32)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_VALUE_DIM], tl.float32)
    if k is not None:
        k += row * k_row + key_head * k_head
        v += row * v_row + key_head * v_head
        if (split == 0) & has_latest:
            key = tl.load(k + column, mask=column < DIM, other=0.0)
            value = tl.load(v + value_column, mask=value_column < VALUE_DIM, other=0.0)
            top = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1, keep_dims=True)
            # The top is rounded; its power is that of the rounding's error.
            product = top
            top = fma(product, unit, 0.0)
            total = power(product, top, unit, IS_FORMED=False)
            acc += total * value.to(tl.float32)
            if tile == 0:
                k_latest = k_cache + row * k_cache_row + length.to(tl.int64) * k_cache_place + key_head * k_cache_head
                v_latest = v_cache + row * v_cache_row + length.to(tl.int64) * v_cache_place + key_head * v_cache_head
                tl.store(k_latest + column, key, mask=column < DIM)
                tl.store(v_latest + value_column, value, mask=value_column < VALUE_DIM)

    k_cache += key_head * k_cache_head
    v_cache += key_head * v_cache_head
    for start in tl.range(first, tl.minimum(first + SPLIT_KEYS, length), BLOCK_KEYS, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_KEYS)[:, None].to(tl.int64)
        inside = place < length
        source, known = row, inside
        if parents is not None:
            source = tl.load(parents + row * parents_row + place * parents_place, mask=inside, other=0).to(tl.int64)
            known = inside & (source >= 0) & (source < cache_rows)
        # Both loads are on their way before either is needed.
        k_address = k_cache + source * k_cache_row + place * k_cache_place + column
        keys = tl.load(k_address, mask=known & (column < DIM), other=0.0)
        v_address = v_cache + source * v_cache_row + place * v_cache_place + value_column
        values = tl.load(v_address, mask=known & (value_column < VALUE_DIM), other=0.0)
        if BLOCK_HEADS == 1:
            scores = tl.sum(keys.to(tl.float32) * query.to(tl.float32), axis=1)[None, :]
        else:
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        # A row number outside the cache gives NaN.
        scores = tl.where(tl.trans(known), scores, float("nan"))
        scores = tl.where(tl.trans(inside), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1, keep_dims=True) * unit)
        shrink = shrinkage(top, higher, IS_FORMED=False)
        weights = power(scores, higher, unit, IS_FORMED=False)
        top, total = higher, total * shrink + tl.sum(weights, axis=1, keep_dims=True)
        if BLOCK_HEADS == 1:
            acc = acc * shrink + tl.sum(tl.trans(weights) * values.to(tl.float32), axis=0)[None, :]
        else:
            acc = acc * shrink + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)

    out_row = row * key_heads * group + head
    is_written = is_head & (value_column < VALUE_DIM)
    if partials is None:
        result = acc / tl.where(total == 0.0, 1.0, total)
        tl.store(out + out_row * VALUE_DIM + value_column, result, mask=is_written)
    else:
        piece = out_row * splits + split
        tl.store(partials + piece * VALUE_DIM + value_column, acc, mask=is_written)
        store_piece(statistics, piece, top, total, is_head)


@triton.jit(do_not_specialize=["heads", "splits", "capacity"])
def combine_splits_kernel(
    partials, statistics, lengths, out, length_step, heads, splits, capacity,
    HAS_LATEST: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """Each program adds up the pieces of one (row, head) that have keys."""
    place = tl.program_id(0).to(tl.int64)
    length, _ = split_length(lengths, length_step, place // heads, capacity, HAS_LATEST)
    used = tl.maximum(tl.cdiv(length, SPLIT_KEYS), 1)
    _, total, acc = add_pieces(
        partials, statistics, place * splits, used, VALUE_DIM, BLOCK_VALUE_DIM, BLOCK_SPLITS, IS_FORMED=False
    )
    column = tl.arange(0, BLOCK_VALUE_DIM)
    tl.store(out + place * VALUE_DIM + column, acc / tl.where(total == 0.0, 1.0, total), mask=column < VALUE_DIM)


def decode_attention(tape: Tape, call: DecodeAttention) -> Tensor:
    """Computes the operator. One launch; two where the capacity is more than one piece."""
    out = tape.outputs(call)
    if out.numel() == 0:
        return out
    lengths, parents, key_cache, value_cache = call.lengths, call.parents, call.key_cache, call.value_cache
    rows, heads, dim = call.query.shape
    cache_rows, capacity, key_heads, value_dim = value_cache.shape
    query, key, value = side_by_side(call.query), side_by_side(call.key), side_by_side(call.value)
    group = heads // key_heads
    tiles = settings.tiles(max(dim, value_dim), group, query.dtype)
    splits, head_tiles = tiles.splits(capacity), -(-group // tiles.block_heads)
    partials = statistics = None
    if splits > 1:
        partials = tape.empty((rows, heads, splits, value_dim), torch.float32, query.device)
        statistics = tape.empty((rows, heads, splits, 2), torch.float32, query.device)
    block_value_dim = max(16, triton.next_power_of_2(value_dim))
    tape.launch(
        decode_attention_kernel, (rows * key_heads * head_tiles * splits,), tiles.options,
        q=query, k=key, v=value, k_cache=key_cache, v_cache=value_cache, lengths=lengths, parents=parents, out=out,
        partials=partials, statistics=statistics, **_strides("q", query), **_strides("k", key),
        **_strides("v", value), **_strides("k_cache", key_cache), **_strides("v_cache", value_cache),
        length_step=lengths.stride(0),
        parents_row=0 if parents is None else parents.stride(0),
        parents_place=0 if parents is None else parents.stride(1),
        key_heads=key_heads, group=group, tiles=head_tiles, splits=splits, capacity=capacity, cache_rows=cache_rows,
        scale=call.scale, DIM=dim, VALUE_DIM=value_dim, PRECISION=precision(query.dtype),
        BLOCK_DIM=max(16, triton.next_power_of_2(dim)), BLOCK_VALUE_DIM=block_value_dim,
        BLOCK_HEADS=tiles.block_heads, BLOCK_KEYS=tiles.block_keys, SPLIT_KEYS=tiles.split_keys, STAGES=tiles.stages,
    )  # fmt: skip
    if partials is not None:
        tape.launch(
            combine_splits_kernel, (rows * heads,), {"num_warps": 1},
            partials=partials, statistics=statistics, lengths=lengths, out=out, length_step=lengths.stride(0),
            heads=heads, splits=splits, capacity=capacity, HAS_LATEST=key is not None, VALUE_DIM=value_dim,
            BLOCK_VALUE_DIM=block_value_dim, BLOCK_SPLITS=TOGETHER, SPLIT_KEYS=tiles.split_keys,
        )  # fmt: skip
    return out


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Returns the strides of [rows, heads, columns] or of a cache [rows, places, heads, columns]; 0 where absent."""
    if x is not None and x.dim() == 4:
        row, place, head, _ = x.stride()
        return {f"{name}_row": row, f"{name}_place": place, f"{name}_head": head}
    return {f"{name}_row": 0 if x is None else x.stride(0), f"{name}_head": 0 if x is None else x.stride(1)}
