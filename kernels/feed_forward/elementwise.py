"""Activation, gate and dropout of the hidden layer of a feed-forward network, element by element.

Forward, of the pre-activation a, or of a gate g and what it lets through, u:

    hidden = mask · f(a) / (1 - p)        hidden = mask · f(g) · u / (1 - p)

Backward, of the gradient d of hidden, with e = mask · d / (1 - p):

    da = e · f'(a)                        dg = e · u · f'(g)        du = e · f(g)

The two tile functions stand in the epilogues of the matmuls of tfm.kernels.feed_forward.epilogue; the kernels run them
alone, beside a matmul of cuBLAS. Pre-activations are [rows, columns], gated ones [rows, 2 · columns], gate
first. The backward also gives hidden, which the second weight's gradient needs, and the sum of da over the rows, the
first bias's gradient: each tile's sums are stored and added up in one order by a second launch, so that the bits are
the same on every run. ReLU alone keeps its hidden instead of its pre-activation: it is positive where the derivative is
1 and the mask kept it, so that nothing is drawn or computed again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.activations import activate, activate_with_derivative
from tfm.kernels.launch import feed_forward as launch
from tfm.kernels.philox import keep_mask, threshold_and_scale
from tfm.kernels.rows import sum_partials
from tfm.kernels.tape import Tape
from tfm.operators.feed_forward import ActivationDropout, ActivationDropoutBackward


@triton.jit
def hidden_tile(gate, up, seed, row, first_column, threshold, scale, site, ACTIVATION: tl.constexpr):
    """Computes hidden of a tile of pre-activations in fp32; `up` and `seed` may be None."""
    value = activate(gate, ACTIVATION)
    if up is not None:
        value *= up
    if seed is not None:
        keep = keep_mask(row, first_column, 0, site, seed, threshold, gate.shape[1])
        value = tl.where(keep, value * tl.cast(scale, tl.float32), 0.0)
    return value


@triton.jit
def backward_tile(
    gradient, saved, seed, dpre, hidden, row, first_column, rows, columns, threshold, scale, site,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Stores dpre and, where wanted, hidden of a tile, given the gradient of hidden in fp32; returns da, 0 outside."""
    column = first_column + tl.arange(0, gradient.shape[1])[None, :]
    inside = (row < rows) & (column < columns)
    WIDTH: tl.constexpr = 2 if GATED else 1
    place = row * (columns * WIDTH) + column
    kept = tl.load(saved + place, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "relu" and not GATED:
        gradient = tl.where(kept <= 0.0, 0.0, gradient * tl.cast(scale, tl.float32))
    else:
        value, derivative = activate_with_derivative(kept, ACTIVATION)
        if GATED:
            up = tl.load(saved + place + columns, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            keep = keep_mask(row, first_column, 0, site, seed, threshold, gradient.shape[1])
            gradient = tl.where(keep, gradient * tl.cast(scale, tl.float32), 0.0)
        if hidden is not None:
            result = value * up if GATED else value
            if seed is not None:
                result = tl.where(keep, result * tl.cast(scale, tl.float32), 0.0)
            tl.store(hidden + row * columns + column, result, mask=inside)
        if GATED:
            tl.store(dpre + place + columns, gradient * value, mask=inside)
            gradient *= up
        gradient = tl.where(inside, gradient * derivative, 0.0)
    tl.store(dpre + place, gradient, mask=inside)
    return gradient


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def activation_dropout_kernel(
    pre, seed, hidden, rows, columns, threshold, scale, site,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes BLOCK_ROWS rows of BLOCK_COLUMNS columns of hidden."""
    strips = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    row = (program // strips).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    first_column = program % strips * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    WIDTH: tl.constexpr = 2 if GATED else 1
    place = row * (columns * WIDTH) + column
    gate = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pre + place + columns, mask=inside, other=0.0).to(tl.float32) if GATED else None
    value = hidden_tile(gate, up, seed, row, first_column, threshold, scale, site, ACTIVATION)
    tl.store(hidden + row * columns + column, value, mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def activation_dropout_backward_kernel(
    dhidden, saved, seed, dpre, hidden, partials, rows, columns, threshold, scale, site,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Each program goes down TILES tiles of a strip; partials [row blocks, columns] get the sums of its rows."""
    strips = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    block = program // strips
    first_column = program % strips * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for tile in range(TILES):
        row = (block.to(tl.int64) * TILES + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (row < rows) & (column < columns)[None, :]
        gradient = tl.load(dhidden + row * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += backward_tile(
            gradient, saved, seed, dpre, hidden, row, first_column, rows, columns, threshold, scale, site,
            ACTIVATION, GATED,
        )  # fmt: skip
    if partials is not None:
        partial = partials + block.to(tl.int64) * columns + column
        tl.store(partial, tl.sum(sums, axis=0), mask=column < columns)


def activation_dropout(tape: Tape, call: ActivationDropout) -> Tensor:
    """Computes hidden of the operator. One launch."""
    hidden = tape.outputs(call)
    rows, columns = hidden.shape
    threshold, scale = threshold_and_scale(call.dropout_p)
    tiles = launch.activation_dropout(rows, columns)
    if tiles.programs:
        tape.launch(
            activation_dropout_kernel, (tiles.programs,), tiles.options,
            pre=call.pre, seed=call.seed, hidden=hidden, rows=rows, columns=columns,
            threshold=threshold, scale=scale, site=call.site, ACTIVATION=call.activation, GATED=call.gated,
            BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns,
        )  # fmt: skip
    return hidden


def activation_dropout_backward(
    tape: Tape, call: ActivationDropoutBackward
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes (dpre, hidden, dbias) of the operator. One launch, two with dbias."""
    dpre, hidden, dbias = outputs = tape.outputs(call)
    rows, columns = call.dhidden.shape
    threshold, scale = threshold_and_scale(call.dropout_p)
    tiles = launch.activation_dropout_backward(rows, columns)
    partials = None
    if dbias is not None:
        strips = -(-columns // tiles.block_columns)
        partials = tape.empty((tiles.programs // strips, 1, columns), torch.float32, dpre.device)
    if tiles.programs:
        tape.launch(
            activation_dropout_backward_kernel, (tiles.programs,), tiles.options,
            dhidden=call.dhidden, saved=call.saved, seed=call.seed, dpre=dpre, hidden=hidden, partials=partials,
            rows=rows, columns=columns, threshold=threshold, scale=scale, site=call.site,
            ACTIVATION=call.activation, GATED=call.gated,
            BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, TILES=tiles.tiles,
        )  # fmt: skip
    if partials is not None:
        sum_partials(tape, partials, dbias)
    return outputs
