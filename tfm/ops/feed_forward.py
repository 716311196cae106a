"""The position-wise feed-forward network, plain and gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.autocast import cast, under_autocast, without_autocast
from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.feed_forward import FeedForward, Network
from tfm.operators.linear_activation import ActivatedLinear, Gated, GatedActivation, Layer
from tfm.ops.backends import choose
from tfm.ops.checks import check_columns, check_floating, check_same_device, check_vector
from tfm.ops.dropout import seed_for
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import feed_forward as reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)


@door
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
    """Computes dropout(activation(x w1ᵀ + b1)) w2ᵀ + b2 ("Attention Is All You Need", section 3.3, equation 2).

    Args:
        x: [..., D], floating point.
        w1: [F, D], as torch.nn.Linear keeps it; taken in the dtype of `x`, whatever its own.
        b1: [F] or None.
        w2: [E, F].
        b2: [E] or None.
        activation: relu, gelu, gelu_tanh, silu, quick_gelu, relu_squared, sigmoid or tanh.
        dropout_p: dropout of the hidden activations, in [0, 1]. Always applied: pass 0 in eval.
        seed: an int or int64 scalar tensor; None draws one.
        site: which of the dropouts that share a seed this is.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        [..., E] in the dtype of `x`, or autocast's.

    Raises:
        ValueError: an unknown activation, shapes, dtypes or devices that do not fit, a probability outside [0, 1], or a
            backend that cannot run.
    """
    (x,) = under_autocast(x)
    check_columns(x)
    check_floating(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check_matrix("w1", w1, x.shape[-1])
    _check_matrix("w2", w2, w1.shape[0])
    check_vector("b1", b1, w1.shape[0])
    check_vector("b2", b2, w2.shape[0])
    check_same_device(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    _check_activation(activation)
    backend = choose("feed_forward", impl, x, _without_elements(x, w1, w2))
    drawn = seed_for(dropout_p, seed, x.device)
    with without_autocast(x.device):
        if backend == "reference":
            return reference.feed_forward(x, w1, b1, w2, b2, activation, dropout_p, drawn, site)
        # Weights take the dtype of x, as under torch's autocast; a bias is read in its own dtype, or in fp32.
        w1, w2 = cast(w1, x.dtype), cast(w2, x.dtype)
        call = Network(x, w1, None, _read(b1, x.dtype), w2, b2, False, activation, dropout_p, drawn, site)
        return apply(FeedForward, namespace_of(backend), call)[0]


@door
def linear_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    *,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Computes dropout(activation(x weightᵀ + bias)), the first half of `feed_forward`.

    Args:
        x: [..., D], floating point.
        weight: [F, D], any strides; taken in the dtype of `x`, whatever its own.
        bias: [F] or None.
        activation, dropout_p, seed, site, impl: as in `feed_forward`.

    Returns:
        [..., F] in the dtype of `x`, or autocast's.

    Raises:
        ValueError: as `feed_forward`.
    """
    (x,) = under_autocast(x)
    check_columns(x)
    check_floating(x=x, weight=weight, bias=bias)
    _check_matrix("weight", weight, x.shape[-1])
    check_vector("bias", bias, weight.shape[0])
    check_same_device(x=x, weight=weight, bias=bias)
    _check_activation(activation)
    backend = choose("linear_activation", impl, x, _without_elements(x, weight, weight))
    drawn = seed_for(dropout_p, seed, x.device)
    with without_autocast(x.device):
        if backend == "reference":
            return reference.linear_activation(x, weight, bias, activation, dropout_p, drawn, site)
        weight, bias = cast(weight, x.dtype), _read(bias, x.dtype)
        call = Layer(x, weight, bias, activation, dropout_p, drawn, site)
        return apply(ActivatedLinear, namespace_of(backend), call)[0]


@door
def gated_feed_forward(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str = "silu",
    dropout_p: float = 0.0,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    seed: Tensor | int | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Computes dropout(activation(x gateᵀ) · (x upᵀ)) downᵀ (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6).

    With biases, each of the three layers adds its own.

    Args:
        x: [..., D], floating point.
        gate_weight: [F, D], or [2 F, D] with the rows of up below those of gate.
        up_weight: [F, D]; None where `gate_weight` holds both.
        down_weight: [E, F].
        activation, dropout_p, seed, site, impl: as in `feed_forward`.
        gate_bias: [F] or None; [2 F] where `gate_weight` holds both.
        up_bias: [F] or None.
        down_bias: [E] or None.

    Returns:
        [..., E] in the dtype of `x`, or autocast's.

    Raises:
        ValueError: as `feed_forward`.
    """
    (x,) = under_autocast(x)
    check_columns(x)
    weights = {"gate_weight": gate_weight, "up_weight": up_weight, "down_weight": down_weight}
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    check_floating(x=x, **weights, **biases)
    _check_matrix("gate_weight", gate_weight, x.shape[-1])
    rows = gate_weight.shape[0]
    if up_weight is None:
        if rows % 2:
            raise BadArgument(f"gate_weight: expected an even number of rows without up_weight, got {rows}")
        rows //= 2
    else:
        _check_matrix("up_weight", up_weight, x.shape[-1])
        if up_weight.shape[0] != rows:
            raise BadArgument(f"up_weight: expected {rows} rows like gate_weight, got {up_weight.shape[0]}")
    _check_matrix("down_weight", down_weight, rows)
    check_vector("gate_bias", gate_bias, gate_weight.shape[0])
    if up_weight is None and up_bias is not None:
        raise BadArgument("up_bias: expected None beside a joined gate_weight, got a tensor: gate_bias holds both")
    check_vector("up_bias", up_bias, rows)
    check_vector("down_bias", down_bias, down_weight.shape[0])
    check_same_device(x=x, **weights, **biases)
    _check_activation(activation)
    backend = choose("gated_feed_forward", impl, x, _without_elements(x, gate_weight, down_weight))
    drawn = seed_for(dropout_p, seed, x.device)
    with without_autocast(x.device):
        if backend == "reference":
            return reference.gated_feed_forward(
                x, gate_weight, up_weight, down_weight, activation, dropout_p, drawn, site, *biases.values()
            )
        gate_weight, down_weight = cast(gate_weight, x.dtype), cast(down_weight, x.dtype)
        up_weight = None if up_weight is None else cast(up_weight, x.dtype)
        if gate_bias is not None or up_bias is not None:
            # Their products add them: an epilogue that did would serve few models.
            pre = _biased(x, gate_weight, gate_bias)
            if up_weight is not None:
                pre = torch.cat((pre, _biased(x, up_weight, up_bias)), -1)
            gated = Gated(pre.view(-1, 2 * rows), activation, dropout_p, drawn, site)
            hidden = apply(GatedActivation, namespace_of(backend), gated)[0]
            return _biased(hidden, down_weight, down_bias).view(*x.shape[:-1], -1)
        call = Network(
            x, gate_weight, up_weight, None, down_weight, _read(down_bias, x.dtype), True, activation,
            dropout_p, drawn, site,
        )  # fmt: skip
        return apply(FeedForward, namespace_of(backend), call)[0]


def _check_matrix(name: str, weight: Tensor, columns: int) -> None:
    if weight.dim() != 2 or weight.shape[1] != columns:
        raise BadArgument(f"{name}: expected [rows, {columns}], got shape {tuple(weight.shape)}")


def _read(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a bias in its own dtype where that is `dtype`, else in fp32: kernels read these."""
    return bias if bias is None or bias.dtype == dtype else cast(bias, torch.float32)


def _biased(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else cast(bias, x.dtype))


def _without_elements(x: Tensor, first: Tensor, second: Tensor) -> str:
    """Says why no kernel multiplies these; empty where one does. `x` may have zero rows."""
    return "" if x.shape[-1] and first.numel() and second.numel() else "expected weights with elements, got none"


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
