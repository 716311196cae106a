"""RMSNorm (Zhang and Sennrich 2019, equation 4), alone and behind dropout and a residual connection."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.reference.layer_norm import add_residual


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_first: bool) -> Tensor:
    """See tfm.ops.rms_norm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if round_first:
        return (y.to(x.dtype) * (weight_offset + weight)).to(x.dtype)
    return (y * (weight_offset + weight.to(wide))).to(x.dtype)


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    weight_offset: float,
    round_first: bool,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """See tfm.ops.residual_rms_norm."""
    h = add_residual(x, residual, dropout_p, seed, site)
    return rms_norm(h, weight, eps, weight_offset, round_first), h
