"""Cross-entropy of a linear layer's output whose logits are never written: they live in registers, a tile at a time.

The forward half of tfm.kernels.cross_entropy.stored, same formulas, for where no gradient is formed beside it. A
program holds a tile of rows and goes through one share of the classes: each tile of logits is a matrix product in fp32
accumulators, folded at once into three numbers a row, in the manner of the online softmax (Milakov and Gimelshein,
2018):

    m = max z        s = sum exp(z - m)        u = sum z        (u with label smoothing only)

A second kernel combines the shares of each row, and forms the target's logit as a dot product of its own: that costs
N · D loads in place of a comparison for each of the N · V logits. Logits are never rounded to 16 bits here, where the
kernel over stored logits reads them so.

Bytes: the weight and the input are read from the L2 cache, and 12 bytes for each row and share are written: 1.5 MB for
8,192 rows of 32,768 classes, where logits are 512 MB. The shares are of a fixed number of classes, so that a row's bits
do not depend on how many rows there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tfm.kernels.cross_entropy.stored import LN_2, LOG2_E, LOWEST, loss_of_row, softcapped
from tfm.kernels.launch import cross_entropy as launch
from tfm.kernels.softmax import natural_top, power
from tfm.kernels.tape import Tape
from tfm.operators.cross_entropy import LinearCrossEntropy

# Parts of one tensor, whose beginnings depend on the number of rows.
PARTS = ("maxima", "exponentials", "sums")


@triton.jit(do_not_specialize=["rows", "classes"], do_not_specialize_on_alignment=PARTS)
def streaming_statistics_kernel(
    input, weight, bias, maxima, exponentials, sums, rows, classes, width, softcap,
    DIM_TILES: tl.constexpr, TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Each program folds TILES tiles of classes into m (base 2), s and u of BLOCK_ROWS rows, [shares, rows] each.

    `input` and `weight` are tensor descriptors; `bias` is `width` long, 0 beyond the classes.
    """
    row_start = tl.program_id(0) * BLOCK_ROWS
    share = tl.program_id(1)
    first = share * TILES * BLOCK_CLASSES
    tiles = tl.minimum(TILES, tl.cdiv(classes - first, BLOCK_CLASSES))
    top = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    exponential = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    # One loop over both would load ahead from tile to tile, but wait for each product before the next.
    for tile in range(tiles):
        start = first + tile * BLOCK_CLASSES
        z = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], tl.float32)
        for k in range(DIM_TILES):
            x = input.load([row_start, k * BLOCK_DIM])
            w = weight.load([start, k * BLOCK_DIM])
            z = tl.dot(x, w.T, z, input_precision="ieee")
        column = start + tl.arange(0, BLOCK_CLASSES)
        if bias is not None:
            z += tl.load(bias + column, mask=column < width, other=0.0)[None, :]
        z = softcapped(z, softcap)
        if sums is not None:
            total += tl.sum(z, axis=1)  # Beyond the classes weight and bias are 0, and so is z.
        if start + BLOCK_CLASSES > classes:
            z = tl.where(column[None, :] < classes, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=1) * LOG2_E)
        exponential *= tl.exp2(top - higher)
        exponential += tl.sum(power(z, higher[:, None], LOG2_E, IS_FORMED=False), axis=1)
        top = higher
    row = row_start + tl.arange(0, BLOCK_ROWS)
    place = share.to(tl.int64) * rows + row
    tl.store(maxima + place, top, mask=row < rows)
    tl.store(exponentials + place, exponential, mask=row < rows)
    if sums is not None:
        tl.store(sums + place, total, mask=row < rows)


@triton.jit(
    do_not_specialize=["rows", "classes", "shares", "ignore_index"], do_not_specialize_on_alignment=PARTS
)  # fmt: skip
def streaming_losses_kernel(
    input, weight, bias, target, maxima, exponentials, sums, losses,
    rows, classes, dim, shares, ignore_index, smoothing, z_loss, softcap,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Each program combines the shares of BLOCK_ROWS rows, always in the same order, and adds the target's part."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    label = tl.load(target + row, mask=inside, other=ignore_index)
    kept = label != ignore_index
    is_class = (label >= 0) & (label < classes)
    label = tl.where(is_class, label, 0)

    peak = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        column = start + tl.arange(0, BLOCK_DIM)[None, :]
        readable = (kept & is_class)[:, None] & (column < dim)
        x = tl.load(input + row[:, None] * dim + column, mask=readable, other=0.0).to(tl.float32)
        w = tl.load(weight + label[:, None] * dim + column, mask=readable, other=0.0).to(tl.float32)
        peak += tl.sum(x * w, axis=1)
    if bias is not None:
        peak += tl.load(bias + label)
    peak = softcapped(peak, softcap)

    top = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    exponential = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for share in range(shares):
        place = tl.cast(share, tl.int64) * rows + row
        maximum = tl.load(maxima + place, mask=inside, other=0.0)
        higher = tl.maximum(top, maximum)
        exponential *= tl.exp2(top - higher)
        exponential += tl.load(exponentials + place, mask=inside, other=1.0) * tl.exp2(maximum - higher)
        top = higher
        if sums is not None:
            total += tl.load(sums + place, mask=inside, other=0.0)
    top, excess = natural_top(top, 1.0, IS_FORMED=False)
    logarithm = (tl.log2(exponential) + excess) * LN_2
    loss = loss_of_row(top, logarithm, peak, total, classes, smoothing, z_loss)
    loss = tl.where(is_class, loss, float("nan"))
    tl.store(losses + row, tl.where(kept, loss, 0.0), mask=inside)


def streaming_cross_entropy(
    tape: Tape, call: LinearCrossEntropy, bias: Tensor | None, losses: Tensor, tiles: launch.StreamingTiles
) -> None:
    """Fills losses [N] (fp32); the weight has the input's dtype, `bias` is as for cross_entropy_. Two launches."""
    input, weight = call.input.contiguous(), call.linear_weight.contiguous()
    (rows, dim), classes = input.shape, weight.shape[0]
    if rows == 0:
        return
    shares = -(-classes // (tiles.tiles * tiles.block_classes))
    smoothing, softcap = call.label_smoothing or None, call.softcap
    statistics = tape.empty((3 if smoothing else 2, shares, rows), torch.float32, input.device)
    maxima, exponentials = statistics[0], statistics[1]
    sums = statistics[2] if smoothing else None
    tape.launch(
        streaming_statistics_kernel, (-(-rows // tiles.block_rows), shares), tiles.options,
        input=TensorDescriptor.from_tensor(input, [tiles.block_rows, tiles.block_dim]),
        weight=TensorDescriptor.from_tensor(weight, [tiles.block_classes, tiles.block_dim]),
        bias=bias, maxima=maxima, exponentials=exponentials, sums=sums,
        rows=rows, classes=classes, width=0 if bias is None else len(bias), softcap=softcap,
        DIM_TILES=-(-dim // tiles.block_dim), TILES=tiles.tiles,
        BLOCK_ROWS=tiles.block_rows, BLOCK_CLASSES=tiles.block_classes, BLOCK_DIM=tiles.block_dim,
    )  # fmt: skip
    ends = launch.streaming_losses(rows, dim)
    tape.launch(
        streaming_losses_kernel, (ends.programs,), ends.options,
        input=input, weight=weight, bias=bias, target=call.target,
        maxima=maxima, exponentials=exponentials, sums=sums, losses=losses,
        rows=rows, classes=classes, dim=dim, shares=shares, ignore_index=call.ignore_index,
        smoothing=smoothing, z_loss=call.z_loss or None, softcap=softcap,
        BLOCK_ROWS=ends.block_rows, BLOCK_DIM=ends.block_columns,
    )  # fmt: skip
