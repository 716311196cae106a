"""RMSNorm, alone and behind dropout and a residual connection."""

from __future__ import annotations

from torch import Tensor

from tfm.ops.backends import choose
from tfm.ops.dropout import seed_for
from tfm.ops.layer_norm import check_norm, check_residual
from tfm.reference import rms_norm as reference


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_first: bool = False,
    impl: str = "auto",
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight_offset + weight) (Zhang and Sennrich 2019, equation 4).

    Args:
        x: [..., C], floating point.
        weight: [C] or None for 1; may be fp32 under a narrower `x`.
        eps: added to the mean square.
        weight_offset: 1 for Gemma's 1 + w.
        round_first: round x / rms to the dtype of `x` before the weight (Llama, T5), not after it (Gemma, torch).
        impl: backend; see tfm.ops.backends.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    check_norm(x, weight, None)
    choose("rms_norm", impl, x)
    return reference.rms_norm(x, weight, eps, weight_offset, round_first)


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    *,
    weight_offset: float = 0.0,
    round_first: bool = False,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h = residual + dropout(x), y = RMSNorm(h), as `residual_layer_norm`; the rest as `rms_norm`.

    Returns:
        (y, h), both in the wider of the two dtypes.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a probability outside [0, 1], a backend that cannot run.
    """
    check_norm(x, weight, None)
    check_residual(x, residual)
    choose("residual_rms_norm", impl, x)
    drawn = seed_for(dropout_p, seed, x.device)
    return reference.residual_rms_norm(x, residual, weight, eps, dropout_p, weight_offset, round_first, drawn, site)
