"""The mixture's forward: two grouped products, the first with the activation in its epilogue, and a sum for each token.

The first gathers its rows of x as it loads them, and reads the rows of gate and up alternately, as
tfm.kernels.feed_forward.epilogue does, whose epilogue it has. The second leaves its rows where they are sorted; a token
then gathers its own, in the order of its places: no row is added to by two programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.experts.groups import experts_product_kernel, gathered_rows, group_of, shared_arguments, weight_of
from tfm.kernels.feed_forward.epilogue import store_hidden
from tfm.kernels.launch import experts as launch
from tfm.kernels.matmul import multiply, tile_of
from tfm.kernels.tape import Tape
from tfm.operators.experts import Experts


@triton.jit
def store_nothing(
    pre, first, rows, column_tile, columns,
    HALVES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores 0 in a tile of pre, of each half where it has two."""
    row = (first + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
    column = (column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    nothing = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], pre.dtype.element_ty)
    for half in tl.static_range(HALVES):
        place = pre + (row * HALVES + half) * columns + column
        tl.store(place, nothing, mask=(row < rows) & (column < columns))


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def experts_hidden_kernel(
    x, order, offsets, weights, bias, hidden, pre, rows, row_tiles, experts, places, columns, depth, x_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, SLICES: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Each program computes one tile of hidden, and of pre where it is kept; that of rows without an expert is 0."""
    HALVES: tl.constexpr = 2 if GATED else 1
    HIDDEN_COLUMNS: tl.constexpr = BLOCK_COLUMNS // HALVES
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(columns, HIDDEN_COLUMNS))
    expert, first, end = group_of(offsets, row_tile, experts, EXPERTS, BLOCK_ROWS)
    if first < end:
        row = first + tl.arange(0, BLOCK_ROWS)
        token, _ = gathered_rows(order, row, end, places)
        first_column = column_tile * HIDDEN_COLUMNS
        product = tl.arange(0, BLOCK_COLUMNS)
        column = (first_column + product // HALVES) % columns + product % HALVES * columns
        weight = weight_of(weights, expert, depth.to(tl.int64) * columns * HALVES)
        b = weight + column[None, :].to(tl.int64) * depth + tl.arange(0, BLOCK_DEPTH)[:, None]
        total = multiply(x + token[:, None] * x_stride, b, 1, depth, EVEN, BLOCK_DEPTH, PRECISION)
        if bias is not None:
            total += tl.load(bias + expert.to(tl.int64) * columns * HALVES + column).to(tl.float32)[None, :]
        store_hidden(
            total, None, None, hidden, pre, row[:, None].to(tl.int64), first_column, end, columns, 0, 1.0, 0,
            ACTIVATION, GATED, SLICES,
        )  # fmt: skip
    elif pre is not None:
        store_nothing(pre, first, rows, column_tile, columns, HALVES, BLOCK_ROWS, HIDDEN_COLUMNS)


@triton.jit(do_not_specialize=["tokens"])
def experts_sum_kernel(
    rows, weights, place, last, y, tokens, columns,
    PLACES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program adds up the sorted rows of some tokens, place after place; those without an expert are left out.

    `weights`: what each is multiplied by, or None; `last`: where the number of rows that have an expert stands.
    """
    token = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    count = tl.load(last)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for k in range(PLACES):
        source = token * PLACES + k
        row = tl.load(place + source, mask=token < tokens, other=0)
        has_expert = (token < tokens) & (row < count)
        value = tl.load(
            rows + row.to(tl.int64) * columns + column, mask=has_expert & (column < columns), other=0.0
        ).to(tl.float32)  # fmt: skip
        if weights is not None:
            value *= tl.load(weights + source, mask=has_expert, other=0.0).to(tl.float32)
        total += value
    tl.store(y + token * columns + column, total, mask=(token < tokens) & (column < columns))


def experts(tape: Tape, call: Experts) -> tuple[Tensor, Tensor]:
    """Computes (y, pre) of the operator. Three launches."""
    y, pre = outputs = tape.outputs(call)
    x, rows, experts_count = call.x, call.order.shape[0], call.offsets.shape[0] - 1
    if rows == 0:
        y.zero_()
        return outputs
    depth, columns = x.shape[1], call.second[0].shape[-1]
    tiles = launch.products(rows, experts_count, x.dtype, tape.chip(x.device))
    hidden = tape.empty((rows, columns), x.dtype, x.device)
    column_tiles = -(-columns * (2 if call.gated else 1) // tiles.block_columns)
    tape.launch(
        experts_hidden_kernel, (tiles.row_tiles * column_tiles,), tiles.options,
        **shared_arguments(tiles, x, experts_count, depth),
        x=x, order=call.order, offsets=call.offsets, weights=tuple(call.first), bias=call.first_bias,
        hidden=hidden, pre=pre if call.save else None, rows=rows, places=call.weights.shape[1], columns=columns,
        x_stride=x.stride(0), ACTIVATION=call.activation, GATED=call.gated, SLICES=tiles.slices,
    )  # fmt: skip
    out = tape.empty((rows, depth), x.dtype, x.device)
    tape.launch(
        experts_product_kernel, (tiles.row_tiles * -(-depth // tiles.block_columns),), tiles.options,
        **shared_arguments(tiles, x, experts_count, columns),
        a=hidden, offsets=call.offsets, weights=tuple(call.second), bias=call.second_bias, out=out,
        columns=depth, column_step=columns, depth_step=1,
    )  # fmt: skip
    sum_rows(tape, out, call.weights, call.place, call.offsets, y)
    return outputs


def sum_rows(tape: Tape, rows: Tensor, weights: Tensor | None, place: Tensor, offsets: Tensor, y: Tensor) -> None:
    """Fills y [T, columns] with the sums of each token's sorted rows, weighted where weights are given. One launch."""
    tokens, columns = y.shape
    tiles = launch.elements(columns)
    tape.launch(
        experts_sum_kernel, (-(-tokens // tiles.block_rows), -(-columns // tiles.block_columns)), tiles.options,
        rows=rows, weights=weights, place=place, last=offsets[-1:], y=y, tokens=tokens, columns=columns,
        PLACES=place.shape[0] // tokens, BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns,
    )  # fmt: skip
