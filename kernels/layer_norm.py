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
from tfm.kernels.library import register
from tfm.kernels.philox import keep_mask, threshold_and_scale
from tfm.kernels.rows import as_rows, cover, load, sum_partials


@triton.jit(do_not_specialize=["rows", "threshold", "site"])
def layer_norm_forward_kernel(
    x, residual, weight, bias, seed, y, h, mean, rstd,
    rows, columns, x_stride, residual_stride, eps, threshold, scale, site,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Each program normalises BLOCK_ROWS rows of CHUNKS chunks; one chunk stays in registers, more are read again."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    value = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    for chunk in range(CHUNKS):
        column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
        value = load(x + row * x_stride + column, inside)
        if seed is not None:
            keep = keep_mask(row, chunk * BLOCK_COLUMNS, 0, site, seed, threshold, BLOCK_COLUMNS)
            value = tl.where(keep, value * tl.cast(scale, tl.float32), 0.0)
        if residual is not None:
            value += load(residual + row * residual_stride + column, inside)
            stored = value.to(h.dtype.element_ty)
            tl.store(h + row * columns + column, stored, mask=inside)
            value = stored.to(tl.float32)
        total += tl.sum(value, axis=1, keep_dims=True)
    average = total / columns

    h_row = x + row * x_stride if residual is None else h + row * columns
    squares = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    for chunk in range(CHUNKS):
        column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
        if CHUNKS > 1:  # The sums above end in a barrier, so that every thread sees h as stored.
            value = load(h_row + column, inside)
        centred = tl.where(inside, value - average, 0.0)
        squares += tl.sum(centred * centred, axis=1, keep_dims=True)
    inverse = tl.rsqrt(squares / columns + tl.cast(eps, tl.float32))
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, inverse, mask=row < rows)

    for chunk in range(CHUNKS):
        column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
        if CHUNKS > 1:
            value = load(h_row + column, inside)
        result = (value - average) * inverse
        if weight is not None:
            result *= load(weight + column, inside)
        if bias is not None:
            result += load(bias + column, inside)
        tl.store(y + row * columns + column, result, mask=inside)


@triton.jit
def load_gradient(dy_row, h_row, weight, average, inverse, column, inside):
    """dy, z and g of the formulas above; dy and g are 0 outside."""
    d_y = load(dy_row + column, inside)
    z = (load(h_row + column, inside) - average) * inverse
    g = d_y if weight is None else d_y * load(weight + column, inside)
    return d_y, z, g


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
        row = tl.cast(tile, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        average = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        row = row[:, None]
        dy_row, h_row = dy + row * dy_stride, h + row * h_stride

        d_y = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        z, g = d_y, d_y
        g_sum = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        gz_sum = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        for chunk in range(CHUNKS):
            column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
            d_y, z, g = load_gradient(dy_row, h_row, weight, average, inverse, column, inside)
            g_sum += tl.sum(g, axis=1, keep_dims=True)
            gz_sum += tl.sum(g * z, axis=1, keep_dims=True)

        for chunk in range(CHUNKS):
            column, inside = cover(row, rows, chunk, columns, BLOCK_COLUMNS)
            if CHUNKS > 1:
                d_y, z, g = load_gradient(dy_row, h_row, weight, average, inverse, column, inside)
            total = (g - (g_sum + z * gz_sum) / columns) * inverse
            if dh is not None:
                total += load(dh + row * dh_stride + column, inside)
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
                    tl.store(partial, load(partial, inside) + d_y * z, mask=inside)
                    tl.store(partial + columns, load(partial + columns, inside) + d_y, mask=inside)

    if partials is not None and CHUNKS == 1:
        column = tl.arange(0, BLOCK_COLUMNS)
        partial = partials + program * 2 * columns + column
        tl.store(partial, tl.sum(dweight, axis=0), mask=column < columns)
        tl.store(partial + columns, tl.sum(dbias, axis=0), mask=column < columns)


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
    aligned = launch.are_aligned(columns, x_stride, residual_stride)
    tiles = launch.layer_norm_forward(rows, columns, aligned)
    with torch.cuda.device_of(x):
        layer_norm_forward_kernel[(tiles.programs,)](
            x=x_rows, residual=residual_rows, weight=as_rows(weight)[0], bias=as_rows(bias)[0], seed=seed,
            y=y, h=h, mean=mean, rstd=rstd,
            rows=rows, columns=columns, x_stride=x_stride, residual_stride=residual_stride,
            eps=eps, threshold=threshold, scale=scale, site=site,
            BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, CHUNKS=tiles.chunks,
            num_warps=tiles.num_warps,
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
    simple = launch.are_aligned(columns, dy_stride, dh_stride, h_stride) and dtypes[0] in (None, h.dtype)
    tiles = launch.layer_norm_backward(rows, columns, simple, launch.multiprocessors(h.device))
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
            sum_partials(partials, dweight, dbias)
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
    def forward(x, residual, weight, bias, eps, dropout_p, seed, site):
        return torch.ops.tfm.residual_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, site)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, _, ctx.dropout_p, seed, ctx.site = inputs
        _, h, mean, rstd = output
        ctx.save_for_backward(x if residual is None else h, mean, rstd, weight, seed)
        ctx.dtypes = tuple(None if given is None else given.dtype for given in (x, residual, weight, bias))
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh, *_):
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
    return ResidualLayerNorm.apply(x, residual, weight, bias, eps, dropout_p, seed, site)[:2]
