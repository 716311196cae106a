"""A linear layer with activation, gate and dropout in its epilogue, and the gradient of its pre-activation.

The formulas are those of tfm.kernels.feed_forward.elementwise.

Forward: hidden of x weightᵀ + bias, or of x weightᵀ gated by x up_weightᵀ, whose rows are read alternately, so that a
gate and what it lets through lie in neighbouring columns of one tile and in the registers of one thread.

Backward: dhidden = dy weight2 is turned into dpre before it is ever stored; the same epilogue gives hidden (row-major:
cuBLAS multiplies by either layout alike, and rows are what the tile stores whole) and the bias gradient's partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.feed_forward.elementwise import (
    activation_dropout,
    activation_dropout_backward,
    backward_tile,
    hidden_tile,
)
from tfm.kernels.launch import feed_forward as launch
from tfm.kernels.launch.device import are_aligned
from tfm.kernels.matmul import halves, multiply, tile_of
from tfm.kernels.philox import threshold_and_scale
from tfm.kernels.rows import as_rows, side_by_side, sum_partials
from tfm.kernels.tape import Tape
from tfm.operators.feed_forward import (
    ActivationDropout,
    ActivationDropoutBackward,
    LinearActivation,
    LinearActivationBackward,
    keeps_hidden,
)


@triton.jit
def store_hidden(
    total, bias, seed, hidden, pre, row, first_column, rows, columns, threshold, scale, site,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Stores hidden and pre of a tile of products, one slice of its columns after the other to spare registers."""
    ROWS: tl.constexpr = total.shape[0]
    HIDDEN_COLUMNS: tl.constexpr = total.shape[1] // 2 if GATED else total.shape[1]
    if SLICES > 1:
        left, right = halves(total)
        store_hidden(
            left, bias, seed, hidden, pre, row, first_column, rows, columns, threshold, scale, site,
            ACTIVATION, GATED, SLICES // 2,
        )  # fmt: skip
        store_hidden(
            right, bias, seed, hidden, pre, row, first_column + HIDDEN_COLUMNS // 2, rows, columns, threshold, scale,
            site, ACTIVATION, GATED, SLICES // 2,
        )  # fmt: skip
    else:
        column = first_column + tl.arange(0, HIDDEN_COLUMNS)[None, :]
        inside = (row < rows) & (column < columns)
        if bias is not None:
            total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        # Rounded as stored, so that forward and backward see the same.
        stored = total.to(hidden.dtype.element_ty)
        if GATED:
            gate, up = tl.split(tl.reshape(stored, [ROWS, HIDDEN_COLUMNS, 2]))
            if pre is not None:
                tl.store(pre + row * (2 * columns) + column, gate, mask=inside)
                tl.store(pre + row * (2 * columns) + columns + column, up, mask=inside)
            gate, up = gate.to(tl.float32), up.to(tl.float32)
        else:
            if pre is not None:
                tl.store(pre + row * columns + column, stored, mask=inside)
            gate, up = stored.to(tl.float32), None
        value = hidden_tile(gate, up, seed, row, first_column, threshold, scale, site, ACTIVATION)
        tl.store(hidden + row * columns + column, value, mask=inside)


@triton.jit
def store_gradient(
    total, saved, seed, dpre, hidden, partial, row, first_column, rows, columns, threshold, scale, site,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Stores dpre, hidden and the partial sums of a tile of dhidden, in slices as above."""
    HALF: tl.constexpr = total.shape[1] // 2
    if SLICES > 1:
        left, right = halves(total)
        store_gradient(
            left, saved, seed, dpre, hidden, partial, row, first_column, rows, columns, threshold, scale, site,
            ACTIVATION, GATED, SLICES // 2,
        )  # fmt: skip
        store_gradient(
            right, saved, seed, dpre, hidden, partial, row, first_column + HALF, rows, columns, threshold, scale, site,
            ACTIVATION, GATED, SLICES // 2,
        )  # fmt: skip
    else:
        gradient = backward_tile(
            total, saved, seed, dpre, hidden, row, first_column, rows, columns, threshold, scale, site,
            ACTIVATION, GATED,
        )  # fmt: skip
        if partial is not None:
            column = first_column + tl.arange(0, total.shape[1])
            tl.store(partial + column, tl.sum(gradient, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def linear_activation_kernel(
    x, weight, up_weight, bias, seed, hidden, pre,
    rows, columns, depth, x_stride, weight_stride, up_stride, threshold, scale, site,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Each program computes one tile of hidden, and of pre where it is kept."""
    HIDDEN_COLUMNS: tl.constexpr = BLOCK_COLUMNS if up_weight is None else BLOCK_COLUMNS // 2
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, HIDDEN_COLUMNS)
    )  # fmt: skip
    first_column = column_tile * HIDDEN_COLUMNS
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    a = x + (row % rows)[:, None].to(tl.int64) * x_stride
    step = tl.arange(0, BLOCK_DEPTH)[:, None]
    product_column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if up_weight is None:
        b = weight + ((first_column + product_column) % columns).to(tl.int64) * weight_stride + step
    else:
        weight_row = ((first_column + product_column // 2) % columns).to(tl.int64)
        is_gate = product_column % 2 == 0
        b = tl.where(is_gate, weight + weight_row * weight_stride, up_weight + weight_row * up_stride) + step
    total = multiply(a, b, 1, depth, EVEN, BLOCK_DEPTH)

    store_hidden(
        total, bias, seed, hidden, pre, row[:, None].to(tl.int64), first_column, rows, columns,
        threshold, scale, site, ACTIVATION, up_weight is not None, SLICES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def linear_activation_backward_kernel(
    dy, weight, saved, seed, dpre, hidden, partials,
    rows, columns, depth, dy_stride, weight_stride, threshold, scale, site,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Each program computes one tile of dpre; partials [row tiles, columns] get the sums of its rows."""
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    )  # fmt: skip
    first_column = column_tile * BLOCK_COLUMNS
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    a = dy + (row % rows)[:, None].to(tl.int64) * dy_stride
    b = weight + tl.arange(0, BLOCK_DEPTH)[:, None].to(tl.int64) * weight_stride + (column % columns)[None, :]
    total = multiply(a, b, weight_stride, depth, EVEN, BLOCK_DEPTH)
    store_gradient(
        total, saved, seed, dpre, hidden, None if partials is None else partials + row_tile.to(tl.int64) * columns,
        row[:, None].to(tl.int64), first_column, rows, columns,
        threshold, scale, site, ACTIVATION, GATED, SLICES,
    )  # fmt: skip


def linear_activation(tape: Tape, call: LinearActivation) -> tuple[Tensor, Tensor]:
    """Computes (hidden, pre) of the operator. One launch, or as many as tfm.kernels.launch.linear_activation says."""
    x, weight, up_weight, bias = call.x, call.weight, call.up_weight, call.bias
    if keeps_hidden(call.gated, call.activation) and call.seed is None and bias is not None:
        # torch's own name for cuBLASLt's epilogue of bias and ReLU, which costs nothing beside the product.
        return torch._addmm_activation(bias.to(x.dtype), x, weight.t()), x.new_empty(0)
    (rows, depth), columns = x.shape, call.columns
    gate, up = weight.chunk(2) if call.gated and up_weight is None else (weight, up_weight)
    (x_rows, x_stride), (gate_rows, weight_stride), (up_rows, up_stride) = as_rows(x), as_rows(gate), as_rows(up)
    aligned = are_aligned(depth, columns, x_stride, weight_stride, up_stride)
    tiles = launch.linear_activation(rows, columns, depth, call.gated, x.dtype, aligned, tape.chip(x.device))
    if tiles is None:
        pre = products(x, weight, up_weight, bias)
        layer = call.gated, call.activation, call.dropout_p, call.seed, call.site
        hidden = activation_dropout(tape, ActivationDropout(pre, *layer))
        return hidden, pre if call.keeps_pre else x.new_empty(0)
    hidden, pre = outputs = tape.outputs(call)
    threshold, scale = threshold_and_scale(call.dropout_p)
    if tiles.programs:
        tape.launch(
            linear_activation_kernel, (tiles.programs,), tiles.options,
            x=x_rows, weight=gate_rows, up_weight=up_rows, bias=side_by_side(bias), seed=call.seed,
            hidden=hidden, pre=pre if call.keeps_pre else None,
            rows=rows, columns=columns, depth=depth,
            x_stride=x_stride, weight_stride=weight_stride, up_stride=up_stride,
            threshold=threshold, scale=scale, site=call.site,
            ACTIVATION=call.activation, EVEN=depth % tiles.block_depth == 0, SLICES=tiles.slices,
            BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, BLOCK_DEPTH=tiles.block_depth,
        )  # fmt: skip
    return outputs


def products(x: Tensor, weight: Tensor, up_weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns the pre-activations by cuBLAS: contiguous, gate and up side by side."""
    if bias is not None:
        return torch.addmm(bias.to(x.dtype), x, weight.t())
    if up_weight is None:
        return torch.mm(x, weight.t())
    pre = x.new_empty((x.shape[0], 2 * weight.shape[0]))
    for half, rows in zip(pre.chunk(2, dim=1), (weight, up_weight), strict=True):
        torch.mm(x, rows.t(), out=half)
    return pre


def linear_activation_backward(
    tape: Tape, call: LinearActivationBackward
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes (dpre, hidden, dbias) of the operator.

    One launch, two with dbias, each one more where tfm.kernels.launch.linear_activation_backward leaves the product to
    cuBLAS.
    """
    dy, weight = call.dy, call.weight
    (rows, depth), columns = dy.shape, weight.shape[1]
    (dy_rows, dy_stride), (weight_rows, weight_stride) = as_rows(dy), as_rows(weight)
    aligned = are_aligned(depth, columns, dy_stride, weight_stride)
    tiles = launch.linear_activation_backward(rows, columns, depth, dy.dtype, aligned, tape.chip(dy.device))
    if tiles is None:
        return activation_dropout_backward(tape, ActivationDropoutBackward(torch.mm(dy, weight), *call[2:]))
    dpre, hidden, dbias = outputs = tape.outputs(call)
    threshold, scale = threshold_and_scale(call.dropout_p)
    partials = None
    if dbias is not None:
        partials = tape.empty((-(-rows // tiles.block_rows), 1, columns), torch.float32, dy.device)
    if tiles.programs:
        tape.launch(
            linear_activation_backward_kernel, (tiles.programs,), tiles.options,
            dy=dy_rows, weight=weight_rows, saved=call.saved, seed=call.seed,
            dpre=dpre, hidden=hidden, partials=partials,
            rows=rows, columns=columns, depth=depth, dy_stride=dy_stride, weight_stride=weight_stride,
            threshold=threshold, scale=scale, site=call.site,
            ACTIVATION=call.activation, GATED=call.gated, EVEN=depth % tiles.block_depth == 0, SLICES=tiles.slices,
            BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, BLOCK_DEPTH=tiles.block_depth,
        )  # fmt: skip
    if partials is not None:
        sum_partials(tape, partials, dbias)
    return outputs
