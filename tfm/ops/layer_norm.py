"""LayerNorm, alone and behind dropout and a residual connection."""

from __future__ import annotations

from torch import Tensor

from tfm.ops.backends import choose
from tfm.ops.checks import check, check_floating, check_same_device, check_vector
from tfm.ops.dropout import seed_for
from tfm.reference import layer_norm as reference


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, impl: str = "auto"
) -> Tensor:
    """LayerNorm over the last dimension (Ba et al. 2016, equation 4), statistics in fp32 at least.

    Args:
        x: [..., C], floating point.
        weight: [C] or None for 1; may be fp32 under a narrower `x`.
        bias: [C] or None for 0.
        eps: added to the variance.
        impl: backend; see tfm.ops.backends.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    check_norm(x, weight, bias)
    if choose("layer_norm", impl, x) == "triton":
        from tfm.kernels import layer_norm as kernels

        return kernels.layer_norm(x, weight, bias, eps)
    return reference.layer_norm(x, weight, bias, eps)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    *,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h = residual + dropout(x), y = LayerNorm(h): "Add & Norm" in one pass.

    ("Attention Is All You Need", figure 1 and section 5.4.) h is rounded to its stored dtype before it is normalised,
    so the backward sees the h that the forward saw.

    Args:
        x: [..., C], a sublayer's output, floating point.
        residual: the shape of `x`.
        weight: [C] or None for 1; may be fp32 under narrower activations.
        bias: [C] or None for 0.
        eps: added to the variance.
        dropout_p: dropout of `x`, in [0, 1]. Always applied: pass 0 in eval.
        seed: an int or int64 scalar tensor; None draws one.
        site: which of the dropouts that share a seed this is.
        impl: backend; see tfm.ops.backends.

    Returns:
        (y, h), both in the wider of the two dtypes. Post-norm layers carry y on, pre-norm layers h.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a probability outside [0, 1], a backend that cannot run.
    """
    check_norm(x, weight, bias)
    check_residual(x, residual)
    wider = residual if residual.dtype.itemsize > x.dtype.itemsize else x
    backend = choose("residual_layer_norm", impl, wider)
    drawn = seed_for(dropout_p, seed, x.device)
    if backend == "triton":
        from tfm.kernels import layer_norm as kernels

        return kernels.residual_layer_norm(x, residual, weight, bias, eps, dropout_p, drawn, site)
    return reference.residual_layer_norm(x, residual, weight, bias, eps, dropout_p, drawn, site)


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """The checks that every norm shares."""
    check(x.dim() > 0 and x.shape[-1] > 0, f"x: expected at least one column, got shape {tuple(x.shape)}")
    check_floating(x=x, weight=weight, bias=bias)
    check_vector("weight", weight, x.shape[-1])
    check_vector("bias", bias, x.shape[-1])
    check_same_device(x=x, weight=weight, bias=bias)


def check_residual(x: Tensor, residual: Tensor) -> None:
    """`residual` fits `x`."""
    expected, came = tuple(x.shape), tuple(residual.shape)
    check(came == expected, f"residual: expected shape {expected} as x, got {came}")
    check_floating(residual=residual)
    check_same_device(x=x, residual=residual)
