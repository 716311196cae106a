"""RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4): tfm.kernels.norm, not centred."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.kernels.norm import norm, residual_norm


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_first: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """See tfm.ops.rms_norm."""
    options = {"weight_offset": weight_offset, "round_first": round_first, "out_dtype": out_dtype}
    return norm(x, weight, None, eps, centred=False, **options)


def residual_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, dropout_p: float, x_bias: Tensor | None,
    weight_offset: float, round_first: bool, out_dtype: torch.dtype | None, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See tfm.ops.residual_rms_norm."""
    options = {"weight_offset": weight_offset, "round_first": round_first, "out_dtype": out_dtype}
    return residual_norm(x, x_bias, residual, weight, None, eps, dropout_p, seed, site, centred=False, **options)
