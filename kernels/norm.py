"""LayerNorm and RMSNorm behind a bias, dropout and a residual connection: one pass over the rows each way.

Forward, row by row ("Add & Norm": "Attention Is All You Need", 2017, figure 1 and section 5.4):

    h = residual + mask · (x + x_bias) / (1 - p)     rounded to its stored dtype; h = x where there is no residual
    z = (h - mean(h)) · rstd                         LayerNorm: rstd = 1 / sqrt(var(h) + eps)
    z = h · rstd                                     RMSNorm: rstd = 1 / sqrt(mean(h²) + eps)
    y = z · (weight_offset + weight) + bias

Backward, with g = dy · (weight_offset + weight) and the gradient dh of h's other users:

    dresidual = rstd · (g - mean(g) - z · mean(g · z)) + dh         RMSNorm: without mean(g)
    dx = dresidual · mask / (1 - p)                                 dx_bias = sum over rows of dx
    dweight = sum over rows of dy · z                               dbias = sum over rows of dy

Saved: h, the statistics (fp32, mean and rstd of each row), weight and the seed. The mask is drawn again from the seed.

Why it is fast: each way is one launch that reads and writes every matrix once (forward x, residual, y and h; backward
dy, dh, h, dx and dresidual), so that its time is bytes over bandwidth: at 8,192 rows of 1,024 in bf16 67 MB and 84 MB,
16 µs and 20 µs at the speed of a copy on an H200, 4.3 TB/s. The parameters' gradients, x_bias's included, leave the
same pass as fp32 partial sums of two programs a multiprocessor, which one small launch adds in a fixed order. Such a
program has its next tiles copied to shared memory while it works on one: two programs' loads alone would not hide the
latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.launch import norm as settings
from tfm.kernels.launch.device import are_aligned
from tfm.kernels.philox import keep_mask, threshold_and_scale
from tfm.kernels.rows import as_rows, cover, load, side_by_side, sum_partials
from tfm.kernels.tape import Tape
from tfm.operators.norm import ResidualNorm, ResidualNormBackward


@triton.jit
def load_weight(weight, column, inside, OFFSET: tl.constexpr):
    """Loads weight_offset + weight in fp32; 1 without a weight."""
    if weight is None:
        return tl.full(inside.shape, 1.0, tl.float32)
    else:  # noqa: RET505 - triton takes a return for the end of both branches
        value = load(weight + column, inside)
        return value if OFFSET == 0.0 else value + OFFSET


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def norm_forward_kernel(
    x, x_bias, residual, weight, bias, seed, y, h, statistics,
    rows, columns, x_stride, residual_stride, eps, threshold, scale, site,
    CENTRED: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Each program normalises BLOCK_ROWS rows of CHUNKS chunks; one chunk stays in registers, more are read again."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    value = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    for chunk in range(CHUNKS):
        column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
        value = load(x + row * x_stride + column, inside)
        if x_bias is not None:
            value += load(x_bias + column, inside)
        if seed is not None:
            keep = keep_mask(row, chunk * BLOCK_COLUMNS, 0, site, seed, threshold, BLOCK_COLUMNS)
            value = tl.where(keep, value * tl.cast(scale, tl.float32), 0.0)
        if residual is not None:
            value += load(residual + row * residual_stride + column, inside)
            stored = value.to(h.dtype.element_ty)
            tl.store(h + row * columns + column, stored, mask=inside)
            value = stored.to(tl.float32)
        total += tl.sum(value if CENTRED else value * value, axis=1, keep_dims=True)

    if CHUNKS > 1 and residual is not None:
        tl.debug_barrier()  # What one thread stored of h another may read below.
    h_row = x + row * x_stride if residual is None else h + row * columns
    average = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    squares = total
    if CENTRED:
        average = total / columns
        squares = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        for chunk in range(CHUNKS):
            column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
            if CHUNKS > 1:
                value = load(h_row + column, inside)
            centred = tl.where(inside, value - average, 0.0)
            squares += tl.sum(centred * centred, axis=1, keep_dims=True)
    inverse = tl.rsqrt(squares / columns + tl.cast(eps, tl.float32))
    if CENTRED:
        tl.store(statistics + row, average, mask=row < rows)
        statistics += rows
    tl.store(statistics + row, inverse, mask=row < rows)

    for chunk in range(CHUNKS):
        column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
        if CHUNKS > 1:
            value = load(h_row + column, inside)
        result = (value - average) * inverse if CENTRED else value * inverse
        if ROUND_FIRST:
            result = round_to_narrower(result, h_row.dtype.element_ty, y.dtype.element_ty)
        if weight is not None:
            result *= load_weight(weight, column, inside, WEIGHT_OFFSET)
        if bias is not None:
            result += load(bias + column, inside)
        tl.store(y + row * columns + column, result, mask=inside)


@triton.jit
def round_to_narrower(value, first: tl.constexpr, second: tl.constexpr):
    """Rounds `value` in fp32 as the narrower of two dtypes stores it; as the first where they are equally wide."""
    if second.primitive_bitwidth < first.primitive_bitwidth:
        return value.to(second).to(tl.float32)
    else:  # noqa: RET505 - triton compiles both where a return ends the branch
        return value.to(first).to(tl.float32)


@triton.jit
def load_gradient(dy_row, h_row, average, inverse, column, inside, CENTRED: tl.constexpr):
    """Loads dy and z of the formulas above; dy is 0 outside."""
    d_y = load(dy_row + column, inside)
    value = load(h_row + column, inside)
    return d_y, (value - average) * inverse if CENTRED else value * inverse


@triton.jit
def add_to(partial, value, inside):
    """Adds to partial sums that this program alone owns; a barrier stands between two additions to one of them."""
    tl.store(partial, load(partial, inside) + value, mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def norm_backward_kernel(
    dy, dh, h, statistics, weight, seed, dx, dresidual, partials,
    rows, columns, dy_stride, dh_stride, h_stride, threshold, scale, site,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, DX_BIAS: tl.constexpr,
    CENTRED: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program strides over tiles of BLOCK_ROWS rows.

    partials [programs, 1 to 3, columns] get its dweight, dbias and dx_bias, those of them that are wanted.
    """
    program = tl.program_id(0)
    dbias_part: tl.constexpr = 1 if DWEIGHT else 0
    dx_bias_part: tl.constexpr = dbias_part + 1 if DBIAS else dbias_part
    parts: tl.constexpr = dx_bias_part + 1 if DX_BIAS else dx_bias_part
    w = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    if CHUNKS == 1:
        column = tl.arange(0, BLOCK_COLUMNS)[None, :]
        w = load_weight(weight, column, tl.broadcast_to(column < columns, w.shape), WEIGHT_OFFSET)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    dx_bias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        average = tl.zeros([BLOCK_ROWS], tl.float32)
        rstd = statistics
        if CENTRED:
            average = tl.load(statistics + row, mask=row < rows, other=0.0)
            rstd = statistics + rows
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        average = average[:, None]
        row = row[:, None]
        dy_row, h_row = dy + row * dy_stride, h + row * h_stride

        d_y = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        z = d_y
        g_sum = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        gz_sum = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        for chunk in range(CHUNKS):
            column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
            d_y, z = load_gradient(dy_row, h_row, average, inverse, column, inside, CENTRED)
            if CHUNKS > 1:
                w = load_weight(weight, column, inside, WEIGHT_OFFSET)
            if CENTRED:
                g_sum += tl.sum(d_y * w, axis=1, keep_dims=True)
            gz_sum += tl.sum(d_y * w * z, axis=1, keep_dims=True)

        if CHUNKS > 1 and parts > 0:
            tl.debug_barrier()  # What one thread added to a partial sum another may read below.
        for chunk in range(CHUNKS):
            column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
            if CHUNKS > 1:
                d_y, z = load_gradient(dy_row, h_row, average, inverse, column, inside, CENTRED)
                w = load_weight(weight, column, inside, WEIGHT_OFFSET)
            total = (d_y * w - (g_sum + z * gz_sum) / columns) * inverse
            if dh is not None:
                total += load(dh + row * dh_stride + column, inside)
            if dresidual is not None:
                tl.store(dresidual + row * columns + column, total, mask=inside)
            if dx is not None or DX_BIAS:
                if seed is not None:
                    keep = keep_mask(row, chunk * BLOCK_COLUMNS, 0, site, seed, threshold, BLOCK_COLUMNS)
                    total = tl.where(keep, total * tl.cast(scale, tl.float32), 0.0)
                if dx is not None:
                    tl.store(dx + row * columns + column, total, mask=inside)

            partial = partials + program * parts * columns + column if parts > 0 else None
            if DWEIGHT:
                if CHUNKS == 1:
                    dweight += d_y * z
                else:
                    add_to(partial, d_y * z, inside)
            if DBIAS:
                if CHUNKS == 1:
                    dbias += d_y
                else:
                    add_to(partial + dbias_part * columns, d_y, inside)
            if DX_BIAS:
                if CHUNKS == 1:
                    dx_bias += total
                else:
                    add_to(partial + dx_bias_part * columns, total, inside)

    if partials is not None and CHUNKS == 1:
        column = tl.arange(0, BLOCK_COLUMNS)
        partial = partials + program * parts * columns + column
        if DWEIGHT:
            tl.store(partial, tl.sum(dweight, axis=0), mask=column < columns)
        if DBIAS:
            tl.store(partial + dbias_part * columns, tl.sum(dbias, axis=0), mask=column < columns)
        if DX_BIAS:
            tl.store(partial + dx_bias_part * columns, tl.sum(dx_bias, axis=0), mask=column < columns)


def residual_norm(tape: Tape, call: ResidualNorm) -> tuple[Tensor, Tensor | None, Tensor]:
    """Computes (y, h, statistics) of the operator. One launch."""
    y, h, statistics = outputs = tape.outputs(call)
    rows, columns = statistics.shape[1], call.x.shape[-1]
    (x, x_stride), (residual, residual_stride) = as_rows(call.x), as_rows(call.residual)
    threshold, scale = threshold_and_scale(call.dropout_p)
    tiles = settings.forward(rows, columns, are_aligned(columns, x_stride, residual_stride))
    tape.launch(
        norm_forward_kernel, (tiles.programs,), tiles.options,
        x=x, x_bias=side_by_side(call.x_bias), residual=residual, weight=side_by_side(call.weight),
        bias=side_by_side(call.bias), seed=call.seed, y=y, h=h, statistics=statistics,
        rows=rows, columns=columns, x_stride=x_stride, residual_stride=residual_stride,
        eps=call.eps, threshold=threshold, scale=scale, site=call.site,
        CENTRED=call.centred, WEIGHT_OFFSET=call.weight_offset, ROUND_FIRST=call.round_first,
        BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, CHUNKS=tiles.chunks,
    )  # fmt: skip
    return outputs


def residual_norm_backward(tape: Tape, call: ResidualNormBackward) -> tuple[Tensor | None, ...]:
    """Computes (dx, dx_bias, dresidual, dweight, dbias) of the operator.

    One launch, two with the gradient of a parameter.
    """
    dx, dx_bias, dresidual, dweight, dbias = outputs = tape.outputs(call)
    rows, columns = call.statistics.shape[1], call.h.shape[-1]
    (dy, dy_stride), (dh, dh_stride), (h, h_stride) = as_rows(call.dy), as_rows(call.dh), as_rows(call.h)
    threshold, scale = threshold_and_scale(call.dropout_p)
    sums = [sum for sum in (dweight, dbias, dx_bias) if sum is not None]
    aligned = are_aligned(columns, dy_stride, dh_stride, h_stride)
    crowded = dx_bias is not None or call.dx not in (None, call.h.dtype)
    tiles = settings.backward(rows, columns, aligned, crowded, tape.chip(h.device).multiprocessors)
    partials = None
    if sums:
        allocate = tape.empty if tiles.chunks == 1 else tape.zeros
        partials = allocate((tiles.programs, len(sums), columns), torch.float32, h.device)
    tape.launch(
        norm_backward_kernel, (tiles.programs,), tiles.options,
        dy=dy, dh=dh, h=h, statistics=call.statistics, weight=side_by_side(call.weight), seed=call.seed,
        dx=dx, dresidual=dresidual, partials=partials,
        rows=rows, columns=columns, dy_stride=dy_stride, dh_stride=dh_stride, h_stride=h_stride,
        threshold=threshold, scale=scale, site=call.site,
        DWEIGHT=dweight is not None, DBIAS=dbias is not None, DX_BIAS=dx_bias is not None,
        CENTRED=len(call.statistics) == 2, WEIGHT_OFFSET=call.weight_offset,
        BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, CHUNKS=tiles.chunks, STAGES=tiles.stages,
    )  # fmt: skip
    if partials is not None:
        sum_partials(tape, partials, *sums)
    return outputs
