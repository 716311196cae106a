"""LayerNorm (Ba et al., "Layer Normalization", 2016, equation 4): tfm.kernels.norm, centred."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.kernels.norm import norm, residual_norm


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None
) -> Tensor:
    """See tfm.ops.layer_norm."""
    return norm(x, weight, bias, eps, centred=True, out_dtype=out_dtype)


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float,
    x_bias: Tensor | None, out_dtype: torch.dtype | None, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See tfm.ops.residual_layer_norm."""
    return residual_norm(
        x, x_bias, residual, weight, bias, eps, dropout_p, seed, site, centred=True, out_dtype=out_dtype
    )
