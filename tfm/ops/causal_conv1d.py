"""A causal convolution over each channel's own sequence."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from tfm.autocast import cast
from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.causal_conv1d import CausalConv1d, Convolution
from tfm.ops.backends import choose
from tfm.ops.checks import check_floating, check_same_device, check_vector
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import causal_conv1d as reference
from tfm.taping import dense

WIDTHS = (2, 3, 4)


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, initial_state: Tensor | None = ...,
    activation: str | None = ..., return_final_state: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., *, initial_state: Tensor | None = ...,
    activation: str | None = ..., return_final_state: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@door
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves each channel with its own few weights, over this step and those before it.

    y[b, d, t] = activation(bias[d] + Σ_k weight[d, k] · x[b, d, t - W + 1 + k]), in fp32 at least, rounded once: the
    short convolution of Mamba and its kin (Gu and Dao 2023, section 3.4). Decoding hands each call's final state to the
    next as its initial state; so may any sequence be cut into pieces.

    Args:
        x: [B, D, S], floating point, any strides: [B, S, D] transposed is read where it lies.
        weight: [D, W], W from 2 to 4; may be fp32 under a narrower `x`.
        bias: [D] or None for 0.
        initial_state: [B, D, W - 1], the steps before the first; None for zeros.
        activation: "silu" or None.
        return_final_state: also return the last W - 1 steps of what was convolved.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        The result in the shape and dtype of `x`; with `return_final_state` also [B, D, W - 1].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, a backend that cannot run.
    """
    _check(x, weight, bias, initial_state, activation)
    others = [None if given is None else given.dtype for given in (weight, bias, initial_state)]
    backend = choose("causal_conv1d", impl, x, "", *others)
    if backend == "reference":
        y, final_state = reference.causal_conv1d(x, weight, bias, initial_state, activation)
    else:
        state = None if initial_state is None else dense(cast(initial_state, x.dtype))
        call = CausalConv1d(x, dense(weight), dense(bias), state, activation == "silu")
        y, final_state = apply(Convolution, namespace_of(backend), call)
    return (y, final_state) if return_final_state else y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, activation: str | None) -> None:
    if x.dim() != 3:
        raise BadArgument(f"x: expected [B, D, S], got shape {tuple(x.shape)}")
    batch, channels, _ = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] not in WIDTHS:
        widths = ", ".join(map(str, WIDTHS))
        raise BadArgument(f"weight: expected [{channels}, W] with W one of {widths}, got {tuple(weight.shape)}")
    check_vector("bias", bias, channels)
    expected = (batch, channels, weight.shape[1] - 1)
    if state is not None and tuple(state.shape) != expected:
        raise BadArgument(f"initial_state: expected {expected}, got {tuple(state.shape)}")
    if activation not in (None, "silu"):
        raise BadArgument(f"activation: expected 'silu' or None, got {activation!r}")
    check_floating(x=x, weight=weight, bias=bias, initial_state=state)
    check_same_device(x=x, weight=weight, bias=bias, initial_state=state)
