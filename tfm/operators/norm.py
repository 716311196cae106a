"""LayerNorm and RMSNorm behind a bias, dropout and a residual connection: the operators and their autograd.

kernels/norm.py gives the mathematics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.operators.operator import Operator, distinct
from tfm.reference.norm import add_residual, layer_norm, rms_norm
from tfm.transforms import Recomputed, differentiable_by


def forward_outputs(
    x: Tensor, residual: Tensor | None, centred: bool, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the forward fills, still empty."""
    stored = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=out_dtype or stored, memory_format=torch.contiguous_format)
    h = None
    if residual is not None:
        h = torch.empty_like(x, dtype=stored, memory_format=torch.contiguous_format)
    rows = x.numel() // x.shape[-1]
    return y, h, torch.empty((2 if centred else 1, rows), dtype=torch.float32, device=x.device)


def backward_outputs(
    h: Tensor, dx: torch.dtype | None, dx_bias: torch.dtype | None, dresidual: torch.dtype | None,
    dweight: torch.dtype | None, dbias: torch.dtype | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What the backward fills, still empty."""

    def matrix(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty_like(h, dtype=dtype, memory_format=torch.contiguous_format)

    def vector(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(h.shape[-1], dtype=dtype, device=h.device)

    return matrix(dx), vector(dx_bias), matrix(dresidual), vector(dweight), vector(dbias)


RESIDUAL_NORM = Operator(
    "residual_norm(Tensor x, Tensor? x_bias, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps,"
    " float dropout_p, int site, bool centred, float weight_offset, bool round_first, ScalarType? out_dtype)"
    " -> (Tensor y, Tensor? h, Tensor statistics)",
    fake=lambda x, x_bias, residual, *options: forward_outputs(x, residual, options[6], options[9]),
)
RESIDUAL_NORM_BACKWARD = Operator(
    "residual_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor statistics, Tensor? weight, Tensor? seed,"
    " float dropout_p, int site, float weight_offset, ScalarType? dx, ScalarType? dx_bias, ScalarType? dresidual,"
    " ScalarType? dweight, ScalarType? dbias) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
    fake=lambda dy, dh, h, statistics, weight, seed, dropout_p, site, weight_offset, *dtypes: backward_outputs(
        h, *dtypes
    ),
)
OPERATORS = (RESIDUAL_NORM, RESIDUAL_NORM_BACKWARD)


def _recompute(ctx, dy: Tensor | None, dh: Tensor | None) -> Recomputed:
    h, _, weight, seed = ctx.saved_tensors
    eps, dropout_p, site, centred, weight_offset, round_first, out_dtype = ctx.options
    has_residual = ctx.dtypes[2] is not None

    def outputs(_, x, x_bias, residual, weight, bias, *rest):
        # h is sum and result at once, and autograd knows it as such: what is added to it here is 0.
        total = h + add_residual(x, residual, x_bias, dropout_p, seed, site) if has_residual else x
        if centred:
            return layer_norm(total, weight, bias, eps, out_dtype), total
        return rms_norm(total, weight, eps, weight_offset, round_first, out_dtype), total

    shapes = (h.shape, h.shape[-1:], h.shape, h.shape[-1:], h.shape[-1:])
    x, x_bias, residual, _, bias = (
        None if dtype is None else torch.zeros(shape, dtype=dtype, device=h.device)
        for shape, dtype in zip(shapes, ctx.dtypes, strict=True)
    )
    return outputs, (None, x if has_residual else h, x_bias, residual, weight, bias, None, None)


class ResidualNorm(torch.autograd.Function):
    """Autograd of the two operators; h is None where there is no residual."""

    # Not setup_context, whose arguments torch binds by name, 23 µs a call: that is most of what a small norm takes.
    @staticmethod
    def forward(ctx, namespace, x, x_bias, residual, weight, bias, seed, options):
        operator = getattr(torch.ops, namespace).residual_norm.default
        y, h, statistics = operator(x, x_bias, residual, weight, bias, seed, *options)
        ctx.save_for_backward(x if h is None else h, statistics, weight, seed)
        ctx.namespace, ctx.options = namespace, options
        ctx.dtypes = tuple(None if given is None else given.dtype for given in (x, x_bias, residual, weight, bias))
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @differentiable_by(_recompute)
    def backward(ctx, dy, dh):
        h, statistics, weight, seed = ctx.saved_tensors
        _, dropout_p, site, _, weight_offset, *_ = ctx.options
        wanted = [
            dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[1:6], strict=True)
        ]
        # Without dropout x and residual have one gradient: it is written once.
        shared = seed is None and wanted[0] == wanted[2]
        if shared:
            wanted[2] = None
        operator = getattr(torch.ops, ctx.namespace).residual_norm_backward.default
        dx, dx_bias, dresidual, dweight, dbias = operator(
            torch.zeros_like(h) if dy is None else dy, dh, h, statistics, weight, seed,
            dropout_p, site, weight_offset, *wanted,
        )  # fmt: skip
        return None, dx, dx_bias, dx if shared else dresidual, dweight, dbias, None, None


def norm(
    namespace: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool,
    weight_offset: float, round_first: bool, out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """Without residual and dropout: y."""
    options = eps, 0.0, 0, centred, weight_offset, round_first, out_dtype
    return ResidualNorm.apply(namespace, *distinct((x, None, None, weight, bias)), None, options)[0]


def residual_norm(
    namespace: str, x: Tensor, x_bias: Tensor | None, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None, site: int, *, centred: bool, weight_offset: float,
    round_first: bool, out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h)."""
    seed = None if seed is None else seed.to(x.device)
    options = eps, dropout_p, site, centred, weight_offset, round_first, out_dtype
    return ResidualNorm.apply(namespace, *distinct((x, x_bias, residual, weight, bias)), seed, options)
