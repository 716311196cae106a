"""RMSNorm (Zhang and Sennrich 2019, equation 4), alone and behind bias, dropout and a residual connection."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.reference.layer_norm import add_residual


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """See tfm.ops.rms_norm."""
    out_dtype = out_dtype or x.dtype
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    if round_first:
        y = y.to(out_dtype if out_dtype.itemsize < x.dtype.itemsize else x.dtype).to(wide)
    if weight is not None:
        y = y * (weight_offset + weight.to(wide))
    return y.to(out_dtype)


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype | None,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """See tfm.ops.residual_rms_norm."""
    h = add_residual(x, residual, x_bias, dropout_p, seed, site)
    return rms_norm(h, weight, eps, weight_offset, round_first, out_dtype), h
