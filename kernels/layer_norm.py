"""LayerNorm (Ba et al., "Layer Normalization", 2016, equation 4) behind dropout and a residual connection, in one pass.

The pair is the "Add & Norm" of "Attention Is All You Need" (2017), figure 1 and section 5.4. Forward, row by row:

    h = residual + mask · x / (1 - p)           rounded to its stored dtype; h = x where there is no residual
    z = (h - mean(h)) · rstd                    rstd = 1 / sqrt(var(h) + eps)
    y = z · weight + bias

Backward, with g = dy · weight and the gradient dh of h's other users:

    dresidual = rstd · (g - mean(g) - z · mean(g · z)) + dh        dx = dresidual · mask / (1 - p)
    dweight = sum over rows of dy · z                              dbias = sum over rows of dy

Saved: h, mean and rstd (fp32, one each a row), weight and the seed. The mask is drawn again from the seed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tfm.kernels import launch
from tfm.kernels.launch import as_rows
from tfm.kernels.library import register
from tfm.kernels.philox import keep_mask, threshold_and_scale


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def layer_norm_forward_kernel(
    x, residual, weight, bias, seed, y, h, mean, rstd,
    rows, columns, x_stride, residual_stride, eps, threshold, scale, site,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program normalises BLOCK_ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)

    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        keep = keep_mask(row, 0, 0, site, seed, threshold, BLOCK_COLUMNS)
        value = tl.where(keep, value * tl.cast(scale, tl.float32), 0.0)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        stored = value.to(h.dtype.element_ty)
        tl.store(h + row * columns + column, stored, mask=inside)
        value = stored.to(tl.float32)

    average = tl.sum(value, axis=1, keep_dims=True) / columns
    centred = tl.where(inside, value - average, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / columns
    inverse = tl.rsqrt(variance + tl.cast(eps, tl.float32))
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, inverse, mask=row < rows)

    result = centred * inverse
    if weight is not None:
        result *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, result, mask=inside)


@triton.jit
def load_gradient(dy_row, h_row, weight, average, inverse, column, columns, inside):
    """dy, z and g of the formulas above, in fp32; dy and g are 0 outside."""
    dy = tl.load(dy_row + column, mask=inside, other=0.0).to(tl.float32)
    z = (tl.load(h_row + column, mask=inside, other=0.0).to(tl.float32) - average) * inverse
    g = dy
    if weight is not None:
        g *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    return dy, z, g


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def layer_norm_backward_kernel(
    dy, dh, h, mean, rstd, weight, seed, dx, dresidual, partials,
    rows, columns, dy_stride, dh_stride, h_stride, threshold, scale, site,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Each program strides over tiles of BLOCK_ROWS rows; partials [programs, 2, columns] get its dweight and dbias."""
    program = tl.program_id(0)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        average = tl.load(mean + row, mask=row < rows, other=0.0)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        dy_row, h_row = dy + row * dy_stride, h + row * h_stride

        g_sum = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        gz_sum = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
            inside = (row < rows) & (column < columns)
            d_y, z, g = load_gradient(dy_row, h_row, weight, average, inverse, column, columns, inside)
            g_sum += tl.sum(g, axis=1, keep_dims=True)
            gz_sum += tl.sum(g * z, axis=1, keep_dims=True)

        for chunk in tl.static_range(CHUNKS):
            # A row of one chunk is still in registers; a wider one is read again, from the cache.
            if CHUNKS > 1:
                column = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
                inside = (row < rows) & (column < columns)
                d_y, z, g = load_gradient(dy_row, h_row, weight, average, inverse, column, columns, inside)

            total = (g - (g_sum + z * gz_sum) / columns) * inverse
            if dh is not None:
                total += tl.load(dh + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
            if dresidual is not None:
                tl.store(dresidual + row * columns + column, total, mask=inside)
            if dx is not None:
                if seed is not None:
                    keep = keep_mask(row, chunk * BLOCK_COLUMNS, 0, site, seed, threshold, BLOCK_COLUMNS)
                    total = tl.where(keep, total * tl.cast(scale, tl.float32), 0.0)
                tl.store(dx + row * columns + column, total, mask=inside)

            if partials is not None:
                if CHUNKS == 1:
                    dweight += d_y * z
                    dbias += d_y
                else:
                    partial = partials + program * 2 * columns + column
                    tl.store(partial, tl.load(partial, mask=inside) + d_y * z, mask=inside)
                    tl.store(partial + columns, tl.load(partial + columns, mask=inside) + d_y, mask=inside)

    if partials is not None and CHUNKS == 1:
        column = tl.arange(0, BLOCK_COLUMNS)
        partial = partials + program * 2 * columns + column
        tl.store(partial, tl.sum(dweight, axis=0), mask=column < columns)
        tl.store(partial + columns, tl.sum(dbias, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partials, dweight, dbias, programs, columns,
    BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program sums BLOCK_COLUMNS columns of partials [programs, 2, columns], always in the same order."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    weight_sum = tl.zeros([BLOCK_PROGRAMS, BLOCK_COLUMNS], tl.float32)
    bias_sum = tl.zeros([BLOCK_PROGRAMS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, programs, BLOCK_PROGRAMS):
        program = start + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        partial = partials + program * 2 * columns + column[None, :]
        inside = (program < programs) & (column < columns)[None, :]
        weight_sum += tl.load(partial, mask=inside, other=0.0)
        bias_sum += tl.load(partial + columns, mask=inside, other=0.0)
    if dweight is not None:
        tl.store(dweight + column, tl.sum(weight_sum, axis=0), mask=column < columns)
    if dbias is not None:
        tl.store(dbias + column, tl.sum(bias_sum, axis=0), mask=column < columns)


def residual_layer_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h, mean, rstd); h is empty where there is no residual. One launch."""
    y, h, mean, rstd = forward_outputs(x, residual)
    columns = x.shape[-1]
    rows = x.numel() // columns
    (x_rows, x_stride), (residual_rows, residual_stride) = as_rows(x), as_rows(residual)
    threshold, scale = threshold_and_scale(dropout_p)
    tiles = launch.layer_norm_forward(rows, columns)
    with torch.cuda.device_of(x):
        layer_norm_forward_kernel[(tiles.programs,)](
            x=x_rows, residual=residual_rows, weight=as_rows(weight)[0], bias=as_rows(bias)[0], seed=seed,
            y=y, h=h, mean=mean, rstd=rstd,
            rows=rows, columns=columns, x_stride=x_stride, residual_stride=residual_stride,
            eps=eps, threshold=threshold, scale=scale, site=site,
            BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, num_warps=tiles.num_warps,
        )  # fmt: skip
    return y, h, mean, rstd


def forward_outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward fills, still empty."""
    stored = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=stored, device=x.device)
    h = torch.empty(0 if residual is None else x.shape, dtype=stored, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return y, h, mean, torch.empty_like(mean)


def residual_layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    dropout_p: float, seed: Tensor | None, site: int, *dtypes: torch.dtype | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dx, dresidual, dweight, dbias) in these dtypes, None where None is given. One launch, two with a parameter."""
    dx, dresidual, dweight, dbias = backward_outputs(h, *dtypes)
    columns = h.shape[-1]
    rows = h.numel() // columns
    (dy_rows, dy_stride), (dh_rows, dh_stride), (h_rows, h_stride) = as_rows(dy), as_rows(dh), as_rows(h)
    threshold, scale = threshold_and_scale(dropout_p)
    tiles = launch.layer_norm_backward(rows, columns, launch.multiprocessors(h.device))
    partials = None
    if dweight is not None or dbias is not None:
        allocate = torch.empty if tiles.chunks == 1 else torch.zeros
        partials = allocate((tiles.programs, 2, columns), dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        layer_norm_backward_kernel[(tiles.programs,)](
            dy=dy_rows, dh=dh_rows, h=h_rows, mean=mean, rstd=rstd, weight=as_rows(weight)[0], seed=seed,
            dx=dx, dresidual=dresidual, partials=partials,
            rows=rows, columns=columns, dy_stride=dy_stride, dh_stride=dh_stride, h_stride=h_stride,
            threshold=threshold, scale=scale, site=site,
            BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, CHUNKS=tiles.chunks,
            num_warps=tiles.num_warps,
        )  # fmt: skip
        if partials is not None:
            sums = launch.sum_partials(columns)
            sum_partials_kernel[(sums.programs,)](
                partials=partials, dweight=dweight, dbias=dbias, programs=tiles.programs, columns=columns,
                BLOCK_PROGRAMS=sums.block_rows, BLOCK_COLUMNS=sums.block_columns, num_warps=sums.num_warps,
            )  # fmt: skip
    return dx, dresidual, dweight, dbias


def backward_outputs(h: Tensor, *dtypes: torch.dtype | None) -> tuple[Tensor | None, ...]:
    """What the backward fills, still empty."""
    shapes = (h.shape, h.shape, h.shape[-1:], h.shape[-1:])
    return tuple(
        None if dtype is None else torch.empty(shape, dtype=dtype, device=h.device)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


register(
    "residual_layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float dropout_p,"
    " Tensor? seed, int site) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    residual_layer_norm_forward,
    fake=lambda x, residual, *_: forward_outputs(x, residual),
)
register(
    "residual_layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor mean, Tensor rstd, Tensor? weight,"
    " float dropout_p, Tensor? seed, int site, ScalarType? dx, ScalarType? dresidual, ScalarType? dweight,"
    " ScalarType? dbias) -> (Tensor?, Tensor?, Tensor?, Tensor?)",
    residual_layer_norm_backward,
    fake=lambda dy, dh, h, mean, rstd, weight, dropout_p, seed, site, *dtypes: backward_outputs(h, *dtypes),
)


class ResidualLayerNorm(torch.autograd.Function):
    """Autograd of the two operators; without a residual h is empty and has no gradient."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dropout_p, seed, site):
        y, h, mean, rstd = torch.ops.tfm.residual_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, site)
        ctx.save_for_backward(x if residual is None else h, mean, rstd, weight, seed)
        ctx.dtypes = tuple(None if given is None else given.dtype for given in (x, residual, weight, bias))
        ctx.dropout_p, ctx.site = dropout_p, site
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        h, mean, rstd, weight, seed = ctx.saved_tensors
        wanted = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[:4], strict=True)]
        # Without dropout x and residual have one gradient: it is written once.
        shared = seed is None and wanted[0] == wanted[1]
        if shared:
            wanted[1] = None
        dx, dresidual, dweight, dbias = torch.ops.tfm.residual_layer_norm_backward(
            torch.zeros_like(h) if dy is None else dy,
            None if ctx.dtypes[1] is None else dh,
            h, mean, rstd, weight, ctx.dropout_p, seed, ctx.site, *wanted,
        )  # fmt: skip
        return dx, dx if shared else dresidual, dweight, dbias, None, None, None, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """See tfm.ops.layer_norm."""
    return ResidualLayerNorm.apply(x, None, weight, bias, eps, 0.0, None, 0)[0]


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See tfm.ops.residual_layer_norm."""
    seed = None if seed is None else seed.to(x.device)
    return ResidualLayerNorm.apply(x, residual, weight, bias, eps, dropout_p, seed, site)
