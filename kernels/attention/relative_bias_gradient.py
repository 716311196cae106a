"""The gradient of a bias by distance, summed over all scores whose keys lie as far from their queries.

With ds of tfm.kernels.attention.gradient_tile, for each head and clipped distance,

    drelative_bias = Σ ds     over the sequences, and the queries and keys so far apart

A tile of B positions and B keys has the same distances as every other as many tiles off the diagonal. So a program adds
up such tiles of all sequences as they stand, and sums their diagonals once, at its end: nothing of the size [H, Sq, Sk]
is stored, and no two programs add to one number. A second launch adds the two tiles that a distance lies in, and the
programs that share their sequences, always in the same order, and at its ends all distances beyond.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.attention.arguments import VARYING, common_arguments, dense_rows
from tfm.kernels.attention.gradient_tile import gradient_tile
from tfm.kernels.attention.heads import head_of, heads_of
from tfm.kernels.attention.visible import Window, first_position, locate
from tfm.kernels.launch.attention import scores as launch
from tfm.kernels.tape import Tape
from tfm.operators.attention import AttentionBackward


@triton.jit(do_not_specialize=[*VARYING, "splits", "sequences", "first_offset", "offsets"])
def relative_bias_gradient_kernel(
    q, k, v, bias, dout, statistics, delta, partials, mask, lengths, window, score, dropout,
    heads, group, query_size, key_size, row_words, row_kind, splits, sequences, first_offset, offsets, start, site,
    DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each program sums a head's tiles that lie one offset from the diagonal, of a share of the sequences."""
    BLOCK: tl.constexpr = TILE[0]
    program = tl.program_id(0)
    offset = first_offset + program % offsets
    head = (program // offsets % heads).to(tl.int64)
    split = program // offsets // heads
    share = tl.cdiv(sequences, splits)
    first_sequence = split * share
    turns = tl.maximum(tl.minimum(share, sequences - first_sequence), 0)
    # Positions begin anywhere in a tile.
    tiles = tl.cdiv(query_size, BLOCK) + 1

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for turn in range(turns * tiles):
        sequence = (first_sequence + turn // tiles).to(tl.int64)
        _, query_length = locate(sequence, lengths.cu_seq_q, None, query_size)
        _, key_length = locate(sequence, lengths.cu_seq_k, lengths.key_lengths, key_size)
        # Farther than all keys and R beside, every distance is clipped alike.
        position = tl.maximum(
            tl.minimum(first_position(sequence, lengths.starts, start), key_size + score.farthest),
            -query_size - score.farthest,
        )
        tile = floor_div(position, BLOCK) + turn % tiles
        first_row, first_column = tile * BLOCK - position, (tile + offset) * BLOCK
        if (first_row < query_length) & (first_column >= 0) & (first_column < key_length):
            added = None
            if bias is not None:
                row, column = first_row + tl.arange(0, BLOCK), first_column + tl.arange(0, BLOCK)
                known = (row >= 0) & (row < query_length)
                address = head_of(bias, sequence, head, 0) + row.to(tl.int64)[:, None] * bias.s
                address += column.to(tl.int64)[None, :] * bias.d
                added = tl.load(address, mask=known[:, None] & (column < key_length)[None, :], other=0.0)
                added = added.to(tl.float32)
            acc += gradient_tile(
                q, k, v, dout, statistics, delta, mask, lengths, window, score, dropout, added,
                sequence, head, first_row, first_column,
                heads, group, query_size, key_size, row_words, row_kind, start, site, DIMS, VALUE_DIMS, PRECISION, TILE,
            )  # fmt: skip

    # Of [row, column] the distance is column - row; by distance, the column of each row is gathered, where it has one.
    diagonal = tl.arange(0, 2 * BLOCK)[None, :]
    place = diagonal - (BLOCK - 1) + tl.arange(0, BLOCK)[:, None]
    has_place = (place >= 0) & (place < BLOCK)
    sums = tl.sum(tl.where(has_place, tl.gather(acc, tl.where(has_place, place, 0), 1), 0.0), axis=0, keep_dims=True)
    tl.store(partials + program.to(tl.int64) * 2 * BLOCK + diagonal, sums)


@triton.jit
def floor_div(x, DIVISOR: tl.constexpr):
    """Computes x / DIVISOR, rounded down, of x above -2^29, where // rounds to 0."""
    return (x + (1 << 29)) // DIVISOR - (1 << 29) // DIVISOR


@triton.jit
def sums_at(partials, distance, inside, head, heads, splits, first_offset, offsets, BLOCK: tl.constexpr):
    """Sums what all programs have of these distances [N] of a head; 0 where not `inside`."""
    # The first of the two tiles is the one whose lower left half holds the distance.
    upper = floor_div(distance, BLOCK) - first_offset
    diagonal = distance - (upper + first_offset) * BLOCK + (BLOCK - 1)
    total = tl.zeros(distance.shape, tl.float32)
    for split in range(splits):
        first = partials + (split * heads + head).to(tl.int64) * offsets * (2 * BLOCK)
        in_upper = inside & (upper >= 0) & (upper < offsets)
        in_lower = inside & (upper >= -1) & (upper + 1 < offsets) & (diagonal >= BLOCK)
        total += tl.load(first + upper * (2 * BLOCK) + diagonal, mask=in_upper, other=0.0)
        total += tl.load(first + (upper + 1) * (2 * BLOCK) + (diagonal - BLOCK), mask=in_lower, other=0.0)
    return total


@triton.jit(do_not_specialize=["heads", "splits", "first_offset", "offsets", "farthest", "places"])
def sum_distances_kernel(
    partials, gradient, heads, splits, first_offset, offsets, farthest, places,
    BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Each program sums PLACES distances of a head; the ends stand for all beyond."""
    head, tile = tl.program_id(0) // places, tl.program_id(0) % places
    place = tile * PLACES + tl.arange(0, PLACES)
    inside = place < 2 * farthest + 1
    total = sums_at(partials, place - farthest, inside, head, heads, splits, first_offset, offsets, BLOCK)
    if tile == 0:
        rest = tl.zeros([PLACES], tl.float32)
        for first in range((first_offset - 1) * BLOCK, -farthest, PLACES):
            distance = first + tl.arange(0, PLACES)
            rest += sums_at(
                partials, distance, distance < -farthest, head, heads, splits, first_offset, offsets, BLOCK
            )  # fmt: skip
        total += tl.where(place == 0, tl.sum(rest, axis=0), 0.0)
    if tile == places - 1:
        rest = tl.zeros([PLACES], tl.float32)
        for first in range(farthest + 1, (first_offset + offsets) * BLOCK, PLACES):
            distance = first + tl.arange(0, PLACES)
            rest += sums_at(
                partials, distance, distance > farthest, head, heads, splits, first_offset, offsets, BLOCK
            )  # fmt: skip
        total += tl.where(place == 2 * farthest, tl.sum(rest, axis=0), 0.0)
    tl.store(gradient + head.to(tl.int64) * (2 * farthest + 1) + place, total, mask=inside)


def relative_bias_gradient(tape: Tape, call: AttentionBackward, delta: Tensor, gradient: Tensor) -> None:
    """Fills the gradient of a bias by distance, dense. Two launches.

    Args:
        tape: see tfm.kernels.tape.
        call: with a bias by distance.
        delta: Σ dout · out - dlse, laid out as the statistics.
        gradient: what is filled.
    """
    attention = call.attention
    tiles = launch.relative_bias_gradient(max(attention.dims), call.query.dtype, tape.chip(gradient.device).major)
    block, farthest = tiles.block_queries, gradient.shape[1] // 2
    first_offset, offsets = offsets_between(attention.max_q, attention.max_k, farthest, call.starts, call.start, block)
    places = attention.heads * offsets
    splits = launch.bias_splits(places, attention.sequences)
    partials = tape.empty((splits, places, 2 * block), torch.float32, gradient.device)
    counts = {"splits": splits, "first_offset": first_offset, "offsets": offsets}
    tape.launch(
        relative_bias_gradient_kernel, (places * splits,), tiles.options,
        **common_arguments(relative_bias_gradient_kernel, attention, whole=True)
        | {"window": Window.closed(call.left, call.right)},
        statistics=dense_rows(attention, call.statistics), delta=delta, dout=heads_of(call.dout), partials=partials,
        sequences=attention.sequences, TILE=(block, block), **counts,
    )  # fmt: skip
    width = 128
    rows = -(-gradient.shape[1] // width)
    tape.launch(
        sum_distances_kernel, (attention.heads * rows,), {"num_warps": 4},
        partials=partials, gradient=gradient, heads=attention.heads, farthest=farthest, places=rows,
        BLOCK=block, PLACES=width, **counts,
    )  # fmt: skip


def offsets_between(
    queries: int, keys: int, farthest: int, starts: Tensor | None, start: int, block: int
) -> tuple[int, int]:
    """Returns the first offset of a tile of keys from a tile of positions, and how many follow, itself included."""
    lowest, highest = -queries - farthest, keys + farthest
    if starts is None:
        lowest = highest = max(lowest, min(start, highest))
    first = -((highest + max(queries, 1) - 1) // block)
    return first, max((max(keys, 1) - 1) // block - lowest // block - first + 1, 1)
