"""RMSNorm, alone and behind bias, dropout and a residual connection."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm import native
from tfm.operators import norm
from tfm.ops.backends import choose
from tfm.ops.checks import check_numbers
from tfm.ops.dropout import seed_for
from tfm.ops.layer_norm import check_norm, check_residual, dtypes_of, reference_only
from tfm.reference import rms_norm as reference


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_first: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (weight_offset + weight) (Zhang and Sennrich 2019, equation 4).

    The families of models differ in what they round, and where weight and activations have two dtypes also in what
    they return:

    | family | weight_offset | round_first | out_dtype |
    |---|---|---|---|
    | torch, gpt-oss | 0 | False | None |
    | Gemma | 1 | False | None |
    | Llama | 0 | True | the wider of x and weight |
    | T5 | 0 | where the weight is of 16 bits | the weight's |

    Args:
        x: [..., C], floating point.
        weight: [C] or None for 1; may be fp32 under a narrower `x`.
        eps: added to the mean square.
        weight_offset: 1 for Gemma's 1 + w.
        round_first: round x / rms to the dtype of `x`, or to `out_dtype` where that is narrower, before the weight.
        out_dtype: of the result; None is that of `x`.
        impl: backend; see tfm.ops.backends.

    Returns:
        Shape of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    check_norm(x, out_dtype, weight=weight)
    check_numbers(eps=eps, weight_offset=weight_offset)
    backend = choose("rms_norm", impl, x, reference_only(x.dtype, out_dtype), out_dtype, *dtypes_of(weight))
    if backend == "reference":
        return reference.rms_norm(x, weight, eps, weight_offset, round_first, out_dtype)
    namespace = native.NAMESPACE
    if backend == "triton":
        from tfm.kernels import norm as kernels

        namespace = kernels.NAMESPACE

    return norm.norm(
        namespace, x, weight, None, eps,
        centred=False, weight_offset=weight_offset, round_first=round_first, out_dtype=out_dtype,
    )  # fmt: skip


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    *,
    x_bias: Tensor | None = None,
    weight_offset: float = 0.0,
    round_first: bool = False,
    out_dtype: torch.dtype | None = None,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h = residual + dropout(x + x_bias), y = RMSNorm(h), as `residual_layer_norm`; the rest as `rms_norm` of h.

    Returns:
        (y, h), h in the wider of the two dtypes.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a probability outside [0, 1], a backend that cannot run.
    """
    check_norm(x, out_dtype, weight=weight, x_bias=x_bias)
    check_numbers(eps=eps, weight_offset=weight_offset)
    check_residual(x, residual)
    wider = residual if residual.dtype.itemsize > x.dtype.itemsize else x
    others = (out_dtype, *dtypes_of(x, residual, weight, x_bias))
    backend = choose("residual_rms_norm", impl, wider, reference_only(wider.dtype, out_dtype), *others)
    drawn = seed_for(dropout_p, seed, x.device)
    if backend == "reference":
        return reference.residual_rms_norm(
            x, residual, weight, eps, dropout_p, x_bias, weight_offset, round_first, out_dtype, drawn, site
        )
    namespace = native.NAMESPACE
    if backend == "triton":
        from tfm.kernels import norm as kernels

        namespace = kernels.NAMESPACE

    return norm.residual_norm(
        namespace, x, x_bias, residual, weight, None, eps, dropout_p, drawn, site,
        centred=False, weight_offset=weight_offset, round_first=round_first, out_dtype=out_dtype,
    )  # fmt: skip
