"""LayerNorm and RMSNorm, alone and behind bias, dropout and a residual connection."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.norm import Norm, ResidualNorm
from tfm.ops.backends import choose
from tfm.ops.checks import check_floating, check_numbers, check_same_device, check_vector
from tfm.ops.dropout import seed_for
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import norm as reference

HALVES = (torch.float16, torch.bfloat16)
OUT_DTYPES = (*HALVES, torch.float32, torch.float64)


@door
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Computes LayerNorm over the last dimension (Ba et al. 2016, equation 4), statistics in fp32 at least.

    Args:
        x: [..., C], floating point.
        weight: [C] or None for 1; may be fp32 under a narrower `x`.
        bias: [C] or None for 0.
        eps: added to the variance.
        out_dtype: of the result; None is that of `x`.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        The result, in the shape of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    check_norm(x, out_dtype, weight=weight, bias=bias)
    check_numbers(eps=eps)
    reason = reference_only(x.dtype, out_dtype)
    backend = choose("layer_norm", impl, x, reason, out_dtype, *dtypes_of(weight, bias))
    if backend == "reference":
        return reference.layer_norm(x, weight, bias, eps, out_dtype)
    call = ResidualNorm(
        x, None, None, weight, bias, None, eps, dropout_p=0.0, site=0,
        centred=True, weight_offset=0.0, round_first=False, out_dtype=out_dtype,
    )  # fmt: skip
    return apply(Norm, namespace_of(backend), call)[0]


@door
def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    *,
    x_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes h = residual + dropout(x + x_bias) and y = LayerNorm(h): "Add & Norm" in one pass.

    ("Attention Is All You Need", figure 1 and section 5.4.) h is rounded to its stored dtype before it is normalised,
    so the backward sees the h that the forward saw.

    Args:
        x: [..., C], a sublayer's output, floating point.
        residual: the shape of `x`.
        weight: [C] or None for 1; may be fp32 under narrower activations.
        bias: [C] or None for 0.
        eps: added to the variance.
        dropout_p: dropout of `x`, in [0, 1]. Always applied: pass 0 in eval.
        x_bias: [C], the bias of the linear layer that made `x`, which then need not add it; its gradient comes out of
            the same pass.
        out_dtype: of y; None is that of h.
        seed: an int or int64 scalar tensor; None draws one.
        site: which of the dropouts that share a seed this is.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        (y, h), h in the wider of the two dtypes. Post-norm layers carry y on, pre-norm layers h.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a probability outside [0, 1], a backend that cannot run.
    """
    check_norm(x, out_dtype, weight=weight, bias=bias, x_bias=x_bias)
    check_numbers(eps=eps)
    check_residual(x, residual)
    wider = residual if residual.dtype.itemsize > x.dtype.itemsize else x
    others = (out_dtype, *dtypes_of(x, residual, weight, bias, x_bias))
    backend = choose("residual_layer_norm", impl, wider, reference_only(wider.dtype, out_dtype), *others)
    drawn = seed_for(dropout_p, seed, x.device)
    if backend == "reference":
        return reference.residual_layer_norm(x, residual, weight, bias, eps, dropout_p, x_bias, out_dtype, drawn, site)
    call = ResidualNorm(
        x, x_bias, residual, weight, bias, drawn, eps, dropout_p, site,
        centred=True, weight_offset=0.0, round_first=False, out_dtype=out_dtype,
    )  # fmt: skip
    return apply(Norm, namespace_of(backend), call)


@door
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
    """Computes x / sqrt(mean(x²) + eps) · (weight_offset + weight) (Zhang and Sennrich 2019, equation 4).

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
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        The result, in the shape of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    check_norm(x, out_dtype, weight=weight)
    check_numbers(eps=eps, weight_offset=weight_offset)
    backend = choose("rms_norm", impl, x, reference_only(x.dtype, out_dtype), out_dtype, *dtypes_of(weight))
    if backend == "reference":
        return reference.rms_norm(x, weight, eps, weight_offset, round_first, out_dtype)
    call = ResidualNorm(
        x, None, None, weight, None, None, eps, dropout_p=0.0, site=0,
        centred=False, weight_offset=weight_offset, round_first=round_first, out_dtype=out_dtype,
    )  # fmt: skip
    return apply(Norm, namespace_of(backend), call)[0]


@door
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
    """Computes h = residual + dropout(x + x_bias) and y = RMSNorm(h), as `residual_layer_norm` and `rms_norm`.

    Args:
        x: [..., C], a sublayer's output, floating point.
        residual: the shape of `x`.
        weight: [C] or None for 1; may be fp32 under narrower activations.
        eps: added to the mean square.
        dropout_p, x_bias, seed, site: as in `residual_layer_norm`.
        weight_offset, round_first: as in `rms_norm`, of h.
        out_dtype: of y; None is that of h.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

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
    call = ResidualNorm(
        x, x_bias, residual, weight, None, drawn, eps, dropout_p, site,
        centred=False, weight_offset=weight_offset, round_first=round_first, out_dtype=out_dtype,
    )  # fmt: skip
    return apply(Norm, namespace_of(backend), call)


def check_norm(x: Tensor, out_dtype: torch.dtype | None, **parameters: Tensor | None) -> None:
    """Checks the arguments that all norms share."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise BadArgument(f"x: expected at least one column, got shape {tuple(x.shape)}")
    check_floating(x=x, **parameters)
    for name, parameter in parameters.items():
        check_vector(name, parameter, x.shape[-1])
    check_same_device(x=x, **parameters)
    if out_dtype is not None and out_dtype not in OUT_DTYPES:
        raise BadArgument(f"out_dtype: expected a floating-point dtype, got {out_dtype}")


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Checks that `residual` fits `x`."""
    if residual.shape != x.shape:
        raise BadArgument(f"residual: expected shape {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    check_floating(residual=residual)
    check_same_device(x=x, residual=residual)


def reference_only(stored: torch.dtype, out_dtype: torch.dtype | None) -> str:
    """Says why no kernel writes the result: it is wider than fp32. Empty where one does."""
    wide = out_dtype == torch.float64 and stored != torch.float64
    return "expected an out_dtype of at most 32 bits, got float64" if wide else ""


def dtypes_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Returns the dtypes; None where there is no tensor."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)
