"""The mixture's backward: what the second product's gradient leaves on its way, then x's gradient and the weights'.

One product gives d of tfm.operators.experts and never stores it: its epilogue turns it into dpre, the hidden layer
times the routing weight, which the second weights' gradient needs, and its part of the routing weight's own gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import activate_with_derivative
from tfm.kernels.experts.forward import sum_rows
from tfm.kernels.experts.groups import experts_product_kernel, gathered_rows, group_of, shared_arguments, weight_of
from tfm.kernels.experts.weights import bias_gradient, weight_gradient
from tfm.kernels.launch import experts as launch
from tfm.kernels.matmul import halves, multiply, tile_of
from tfm.kernels.tape import Tape
from tfm.operators.experts import ExpertsBackward

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def store_gradient(
    total, pre, factor, dpre, hidden, row, first_column, end, columns,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Stores dpre and the weighted hidden of a tile of d, in slices to spare registers; returns sums of d · hidden."""
    if SLICES > 1:
        left, right = halves(total)
        HALF: tl.constexpr = total.shape[1] // 2
        first = store_gradient(
            left, pre, factor, dpre, hidden, row, first_column, end, columns, ACTIVATION, GATED, SLICES // 2
        )
        second = store_gradient(
            right, pre, factor, dpre, hidden, row, first_column + HALF, end, columns, ACTIVATION, GATED, SLICES // 2
        )
        return first + second
    else:  # noqa: RET505 - triton takes a return for the end of both branches
        column = first_column + tl.arange(0, total.shape[1])[None, :]
        inside = (row < end) & (column < columns)
        WIDTH: tl.constexpr = 2 if GATED else 1
        place = row * (columns * WIDTH) + column
        kept = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32)
        value, derivative = activate_with_derivative(kept, ACTIVATION)
        gradient = total * factor
        if GATED:
            up = tl.load(pre + place + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(dpre + place + columns, gradient * value, mask=inside)
            gradient *= up
            value *= up
        tl.store(dpre + place, gradient * derivative, mask=inside)
        if hidden is not None:
            tl.store(hidden + row * columns + column, value * factor, mask=inside)
        return tl.sum(tl.where(inside, total * value, 0.0), axis=1)


@triton.jit(do_not_specialize=["row_tiles"])
def experts_hidden_backward_kernel(
    dy, order, offsets, routing, weights, pre, dpre, hidden, partials,
    row_tiles, experts, places, columns, depth, dy_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, SLICES: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Each program computes one tile of dpre; partials [column tiles, rows] get the sums of its rows."""
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(columns, BLOCK_COLUMNS))
    expert, first, end = group_of(offsets, row_tile, experts, EXPERTS, BLOCK_ROWS)
    if first < end:
        row = first + tl.arange(0, BLOCK_ROWS)
        token, source = gathered_rows(order, row, end, places)
        first_column = column_tile * BLOCK_COLUMNS
        column = (first_column + tl.arange(0, BLOCK_COLUMNS)) % columns
        weight = weight_of(weights, expert, depth.to(tl.int64) * columns)
        b = weight + column[None, :] + tl.arange(0, BLOCK_DEPTH)[:, None].to(tl.int64) * columns
        total = multiply(dy + token[:, None] * dy_stride, b, columns, depth, EVEN, BLOCK_DEPTH, PRECISION)
        factor = tl.load(routing + source, mask=row < end, other=0.0).to(tl.float32)
        sums = store_gradient(
            total, pre, factor[:, None], dpre, hidden, row[:, None].to(tl.int64), first_column, end, columns,
            ACTIVATION, GATED, SLICES,
        )  # fmt: skip
        if partials is not None:
            rows = tl.load(offsets + experts)
            tl.store(partials + column_tile.to(tl.int64) * rows + row, sums, mask=row < end)


@triton.jit(do_not_specialize=["tokens"])
def experts_routing_gradient_kernel(
    partials, order, offsets, place, dy, bias, dweights, rows, experts, places, tiles, columns, dy_stride,
    EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program adds up d · hidden and dy · bias of the experts of BLOCK_ROWS places; 0 where there is none."""
    source = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.load(place + source, mask=source < rows, other=0)
    count = tl.load(offsets + experts)
    has_expert = (source < rows) & (row < count)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    partial = partials + row
    for _ in range(tiles):
        total += tl.load(partial, mask=has_expert, other=0.0)
        partial += count
    if bias is not None:
        lane = tl.arange(0, EXPERTS)[None, :]
        end = tl.load(offsets + 1 + lane, mask=lane < experts, other=0)
        expert = tl.sum(((end <= row[:, None]) & (lane < experts)).to(tl.int32), axis=1)
        token = (source // places).to(tl.int64)
        for start in range(0, columns, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
            inside = has_expert[:, None] & (column < columns)
            gradient = tl.load(dy + token[:, None] * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
            added = tl.load(bias + expert[:, None].to(tl.int64) * columns + column, mask=inside, other=0.0)
            total += tl.sum(gradient * added.to(tl.float32), axis=1)
    tl.store(dweights + source, total, mask=source < rows)


def experts_backward(tape: Tape, call: ExpertsBackward) -> Gradients:
    """Computes the gradients of the operator. One launch, two for x, and one for each other gradient."""
    dx, dweights, dfirst, dsecond, dfirst_bias, dsecond_bias = outputs = tape.outputs(call)
    dy, rows, experts = call.dy, call.order.shape[0], call.experts
    if rows == 0:
        for gradient in outputs:
            if gradient is not None:
                gradient.zero_()
        return outputs
    depth, columns, width = dy.shape[1], call.second[0].shape[-1], call.pre.shape[1]
    chip = tape.chip(dy.device)
    tiles = launch.products(rows, experts, dy.dtype, chip, heavy=True)
    column_tiles = -(-columns // tiles.block_columns)
    dpre = tape.empty((rows, width), dy.dtype, dy.device)
    hidden = None if dsecond is None else tape.empty((rows, columns), dy.dtype, dy.device)
    partials = None if dweights is None else tape.empty((column_tiles, rows), torch.float32, dy.device)
    tape.launch(
        experts_hidden_backward_kernel, (tiles.row_tiles * column_tiles,), tiles.options,
        **shared_arguments(tiles, dy, experts, depth),
        dy=dy, order=call.order, offsets=call.offsets, routing=call.weights, weights=tuple(call.second),
        pre=call.pre, dpre=dpre, hidden=hidden, partials=partials, places=call.weights.shape[1], columns=columns,
        dy_stride=dy.stride(0), ACTIVATION=call.activation, GATED=call.gated, SLICES=tiles.slices,
    )  # fmt: skip
    if dx is not None:
        parts = tape.empty((rows, depth), dy.dtype, dy.device)
        tiles = launch.products(rows, experts, dy.dtype, chip)
        tape.launch(
            experts_product_kernel, (tiles.row_tiles * -(-depth // tiles.block_columns),), tiles.options,
            **shared_arguments(tiles, dy, experts, width),
            a=dpre, offsets=call.offsets, weights=tuple(call.first), bias=None, out=parts,
            columns=depth, column_step=1, depth_step=depth,
        )  # fmt: skip
        sum_rows(tape, parts, None, call.place, call.offsets, dx)
    if dweights is not None and partials is not None:
        _routing_gradient(tape, call, partials, dweights)
    if dfirst is not None:
        weight_gradient(tape, call, dpre, None, call.x, dfirst)
    if dsecond is not None and hidden is not None:
        weight_gradient(tape, call, None, dy, hidden, dsecond)
    if dfirst_bias is not None:
        bias_gradient(tape, call, dpre, None, dfirst_bias)
    if dsecond_bias is not None:
        bias_gradient(tape, call, dy, call.weights, dsecond_bias)
    return outputs


def _routing_gradient(tape: Tape, call: ExpertsBackward, partials: Tensor, dweights: Tensor) -> None:
    rows, columns = call.order.shape[0], call.dy.shape[1]
    tiles = launch.elements(columns)
    block_rows = max(16, tiles.block_rows)
    tape.launch(
        experts_routing_gradient_kernel, (-(-rows // block_rows),), tiles.options,
        partials=partials, order=call.order, offsets=call.offsets, place=call.place, dy=call.dy,
        bias=call.second_bias, dweights=dweights, rows=rows, experts=call.experts, places=call.weights.shape[1],
        tiles=partials.shape[0], columns=columns, dy_stride=call.dy.stride(0),
        EXPERTS=triton.next_power_of_2(call.experts), BLOCK_ROWS=block_rows, BLOCK_COLUMNS=128,
    )  # fmt: skip
