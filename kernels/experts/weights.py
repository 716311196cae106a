"""The gradients of an expert's weights and biases: sums over its rows, in their order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.launch import experts as launch
from tfm.kernels.matmul import precision, tile_of
from tfm.kernels.tape import Tape
from tfm.operators.experts import ExpertsBackward


@triton.jit
def experts_weight_gradient_kernel(
    left, right, order, offsets, out, places, rows, columns, left_stride, right_stride,
    LEFT_GATHERED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Each program computes a tile of leftᵀ right of one expert, out [experts, rows, columns].

    One of the two lies sorted, of the other the rows of their tokens are gathered.
    """
    expert = tl.program_id(1)
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS))
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, end, BLOCK_DEPTH):
        place = start + tl.arange(0, BLOCK_DEPTH)
        inside = (place < end)[:, None]
        token = (tl.load(order + place, mask=place < end, other=0) // places).to(tl.int64)[:, None]
        own = place.to(tl.int64)[:, None]
        a = left + (token if LEFT_GATHERED else own) * left_stride + (row % rows)[None, :]
        b = right + (own if LEFT_GATHERED else token) * right_stride + (column % columns)[None, :]
        a_tile, b_tile = tl.load(a, mask=inside, other=0.0), tl.load(b, mask=inside, other=0.0)
        total = tl.dot(tl.trans(a_tile), b_tile, total, input_precision=PRECISION)
    out += expert.to(tl.int64) * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def experts_bias_gradient_kernel(
    gradient, routing, order, offsets, out, places, columns, stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program sums columns of one expert's rows; with `routing` of its tokens' rows, weighted by that."""
    expert = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        if routing is None:
            value = tl.load(gradient + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
            total += value.to(tl.float32)
        else:
            source = tl.load(order + row, mask=row < end, other=0)
            token = (source // places).to(tl.int64)
            value = tl.load(gradient + token[:, None] * stride + column[None, :], mask=inside, other=0.0)
            factor = tl.load(routing + source, mask=row < end, other=0.0).to(tl.float32)
            total += value.to(tl.float32) * factor[:, None]
    tl.store(out + expert.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)


def weight_gradient(
    tape: Tape, call: ExpertsBackward, sorted_left: Tensor | None, gathered_left: Tensor | None, right: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """Fills out [experts, rows, columns] with products of a left side, sorted or gathered, and a right. One launch."""
    left = gathered_left if sorted_left is None else sorted_left
    assert left is not None
    tiles = launch.weight_gradient(left.dtype, tape.chip(left.device))
    experts, rows, columns = out.shape
    tile_count = -(-rows // tiles.block_rows) * -(-columns // tiles.block_columns)
    tape.launch(
        experts_weight_gradient_kernel, (tile_count, experts), tiles.options,
        left=left, right=right, order=call.order, offsets=call.offsets, out=out, places=call.weights.shape[1],
        rows=rows, columns=columns, left_stride=left.stride(0), right_stride=right.stride(0),
        LEFT_GATHERED=sorted_left is None, PRECISION=precision(left.dtype),
        BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, BLOCK_DEPTH=tiles.block_depth,
    )  # fmt: skip


def bias_gradient(tape: Tape, call: ExpertsBackward, gradient: Tensor, routing: Tensor | None, out: Tensor) -> None:
    """Fills out [experts, columns] with sums over each expert's rows, or over its tokens' weighted rows. One launch."""
    experts, columns = out.shape
    tiles = launch.elements(columns)
    tape.launch(
        experts_bias_gradient_kernel, (-(-columns // tiles.block_columns), experts), tiles.options,
        gradient=gradient, routing=routing, order=call.order, offsets=call.offsets, out=out,
        places=call.weights.shape[1], columns=columns, stride=gradient.stride(0),
        BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns,
    )  # fmt: skip
