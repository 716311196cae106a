"""LayerNorm (Ba et al. 2016, equation 4) and RMSNorm (Zhang and Sennrich 2019, equation 4).

Alone, and behind bias, dropout and a residual connection: the latter is the "Add & Norm" of "Attention Is All You
Need", figure 1 and section 5.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.reference.dropout import dropout


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    """Computes tfm.ops.layer_norm."""
    # Statistics are fp32 at least; the result is rounded once.
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(out_dtype or x.dtype)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    x_bias: Tensor | None,
    out_dtype: torch.dtype | None,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """Computes tfm.ops.residual_layer_norm."""
    h = add_residual(x, residual, x_bias, dropout_p, seed, site)
    return layer_norm(h, weight, bias, eps, out_dtype), h


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_first: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """Computes tfm.ops.rms_norm."""
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
    """Computes tfm.ops.residual_rms_norm."""
    h = add_residual(x, residual, x_bias, dropout_p, seed, site)
    return rms_norm(h, weight, eps, weight_offset, round_first, out_dtype), h


def add_residual(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, dropout_p: float, seed: Tensor | None, site: int
) -> Tensor:
    """Computes residual + dropout(x + x_bias), in fp32 at least, rounded to the wider of the two dtypes."""
    stored = torch.promote_types(x.dtype, residual.dtype)
    wide = torch.promote_types(stored, torch.float32)
    x = x.to(wide) if x_bias is None else x.to(wide) + x_bias.to(wide)
    return (residual.to(wide) + dropout(x, dropout_p, seed, site)).to(stored)
