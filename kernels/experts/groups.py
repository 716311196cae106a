"""What grouped products share: which expert a tile of sorted rows is of, and where that expert's weight lies."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.launch.experts import GroupTiles
from tfm.kernels.matmul import multiply, precision, tile_of


@triton.jit
def group_of(offsets, tile, experts, EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Returns a row tile's expert, its first row, and the end of the expert's rows.

    Behind the last tile of an expert come those of rows without one: they begin at their end, or behind it.
    """
    lane = tl.arange(0, EXPERTS)
    known = lane < experts
    begin = tl.load(offsets + lane, mask=known, other=0)
    end = tl.load(offsets + lane + 1, mask=known, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_ROWS)
    behind = tl.cumsum(tiles, 0)
    expert = tl.sum((known & (behind <= tile)).to(tl.int32), 0)
    is_own = lane == expert
    first = tl.sum(tl.where(is_own, begin + (tile - behind + tiles) * BLOCK_ROWS, 0), 0)
    last = tl.max(end, 0)
    if expert == experts:
        first = last + (tile - tl.sum(tiles, 0)) * BLOCK_ROWS
    return expert, first, tl.where(expert == experts, last, tl.sum(tl.where(is_own, end, 0), 0))


@triton.jit
def weight_of(weights, expert, size):
    """Returns the address of an expert's weight: of one tensor for all, or of one among a tuple for each.

    A tuple's addresses lie beside a kernel's other arguments, where they are read as fast as numbers in its code.
    """
    if len(weights) == 1:
        return weights[0] + expert.to(tl.int64) * size
    else:  # noqa: RET505 - triton takes a return for the end of both branches
        found = weights[0]
        for other in tl.static_range(1, len(weights)):
            found = tl.where(expert == other, weights[other], found)
        return found


@triton.jit
def gathered_rows(order, row, end, places):
    """Returns the tokens of sorted rows, 0 behind the last, and where their routing weights stand."""
    source = tl.load(order + row, mask=row < end, other=0)
    return (source // places).to(tl.int64), source.to(tl.int64)


@triton.jit(do_not_specialize=["row_tiles"])
def experts_product_kernel(
    a, offsets, weights, bias, out, row_tiles, experts, columns, depth, column_step, depth_step,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Each program multiplies a tile of sorted rows of a [rows, depth] by columns of their expert's weight.

    A weight's element of a column and a depth is `column_step` and `depth_step` apart from its neighbours.
    """
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles)
    expert, first, end = group_of(offsets, row_tile, experts, EXPERTS, BLOCK_ROWS)
    if first < end:
        row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        # Rows behind the last are another's, or the last: they are read, and not stored.
        left = a + tl.minimum(row, end - 1)[:, None] * depth
        weight = weight_of(weights, expert, columns.to(tl.int64) * depth)
        step = tl.arange(0, BLOCK_DEPTH)[:, None].to(tl.int64)
        right = weight + (column % columns)[None, :].to(tl.int64) * column_step + step * depth_step
        total = multiply(left, right, depth_step, depth, EVEN, BLOCK_DEPTH, PRECISION)
        inside = column < columns
        if bias is not None:
            place = bias + expert.to(tl.int64) * columns + column
            total += tl.load(place, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(out + row[:, None] * columns + column[None, :], total, mask=(row < end)[:, None] & inside[None, :])


def shared_arguments(tiles: GroupTiles, x: Tensor, experts: int, depth: int) -> dict[str, Any]:
    """Returns the arguments that all grouped products have."""
    return {
        "row_tiles": tiles.row_tiles, "experts": experts, "depth": depth,
        "EVEN": depth % tiles.block_depth == 0, "PRECISION": precision(x.dtype),
        "EXPERTS": triton.next_power_of_2(experts),
        "BLOCK_ROWS": tiles.block_rows, "BLOCK_COLUMNS": tiles.block_columns, "BLOCK_DEPTH": tiles.block_depth,
    }  # fmt: skip
