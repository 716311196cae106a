"""The position-wise feed-forward network, plain and gated."""

from __future__ import annotations

from torch import Tensor

from tfm.ops.backends import choose
from tfm.ops.checks import check, check_columns, check_floating, check_same_device, check_vector
from tfm.ops.dropout import seed_for
from tfm.reference import feed_forward as reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    dropout_p: float = 0.0,
    *,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """dropout(activation(x w1ᵀ + b1)) w2ᵀ + b2 ("Attention Is All You Need", section 3.3, equation 2).

    Args:
        x: [..., D], floating point.
        w1: [F, D], as torch.nn.Linear keeps it; may be fp32 under a narrower `x`.
        b1: [F] or None.
        w2: [E, F].
        b2: [E] or None.
        activation: relu, gelu, gelu_tanh, silu, quick_gelu, relu_squared, sigmoid or tanh.
        dropout_p: dropout of the hidden activations, in [0, 1]. Always applied: pass 0 in eval.
        seed: an int or int64 scalar tensor; None draws one.
        site: which of the dropouts that share a seed this is.
        impl: backend; see tfm.ops.backends.

    Returns:
        [..., E] in the dtype of `x`.

    Raises:
        ValueError: an unknown activation, shapes, dtypes or devices that do not fit, a probability outside [0, 1], or a
            backend that cannot run.
    """
    check_columns(x)
    check_floating(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check_matrix("w1", w1, x.shape[-1])
    _check_matrix("w2", w2, w1.shape[0])
    check_vector("b1", b1, w1.shape[0])
    check_vector("b2", b2, w2.shape[0])
    check_same_device(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check_activation(activation)
    choose("feed_forward", impl, x)
    drawn = seed_for(dropout_p, seed, x.device)
    return reference.feed_forward(x, w1, b1, w2, b2, activation, dropout_p, drawn, site)


def gated_feed_forward(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    activation: str = "silu",
    dropout_p: float = 0.0,
    *,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """dropout(activation(x gateᵀ) · (x upᵀ)) downᵀ (Shazeer 2020, "GLU Variants Improve Transformer", equation 6).

    Args:
        x: [..., D], floating point.
        gate_weight, up_weight: [F, D].
        down_weight: [E, F].
        activation, dropout_p, seed, site, impl: as in `feed_forward`.

    Returns:
        [..., E] in the dtype of `x`.

    Raises:
        ValueError: as `feed_forward`.
    """
    check_columns(x)
    check_floating(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    _check_matrix("gate_weight", gate_weight, x.shape[-1])
    _check_matrix("up_weight", up_weight, x.shape[-1])
    _check_matrix("down_weight", down_weight, gate_weight.shape[0])
    rows = gate_weight.shape[0], up_weight.shape[0]
    check(rows[0] == rows[1], f"up_weight: expected {rows[0]} rows as gate_weight, got {rows[1]}")
    check_same_device(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    _check_activation(activation)
    choose("gated_feed_forward", impl, x)
    drawn = seed_for(dropout_p, seed, x.device)
    return reference.gated_feed_forward(x, gate_weight, up_weight, down_weight, activation, dropout_p, drawn, site)


def _check_matrix(name: str, weight: Tensor, columns: int) -> None:
    fits = weight.dim() == 2 and weight.shape[1] == columns
    check(fits, f"{name}: expected [rows, {columns}], got shape {tuple(weight.shape)}")


def _check_activation(activation: str) -> None:
    check(activation in ACTIVATIONS, f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
