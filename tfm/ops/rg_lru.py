"""The real-gated linear recurrent unit of Griffin and RecurrentGemma."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from tfm.autocast import cast
from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.rg_lru import GatedRecurrence, RgLru
from tfm.ops.backends import choose
from tfm.ops.checks import check_floating, check_same_device, check_vector
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import rg_lru as reference
from tfm.taping import dense


@overload
def rg_lru(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, recurrent_param: Tensor, *, reset: Tensor | None = ...,
    initial_state: Tensor | None = ..., return_final_state: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rg_lru(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, recurrent_param: Tensor, *, reset: Tensor | None = ...,
    initial_state: Tensor | None = ..., return_final_state: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@door
def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    recurrent_param: Tensor,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Carries a state through the steps of each channel, of which gates say how much stays and how much comes in.

    y[t] = a[t] · y[t - 1] + √(1 - a[t]²) · s(input_gate[t]) · x[t] with s the logistic function and
    a[t] = exp(-8 · softplus(recurrent_param) · s(recurrence_gate[t])), in fp32 at least, rounded once: the RG-LRU (De
    et al. 2024, "Griffin", section 2.4, equations 1 to 4), with all that is element-wise around its recurrence, in one
    pass. The derivative of the square root is bounded by 1000, as RecurrentGemma bounds it. Decoding hands each call's
    final state to the next as its initial state; so may any sequence be cut into pieces.

    Args:
        x: [B, S, D], floating point, any strides, as the gates may have.
        input_gate: [B, S, D] of the dtype of `x`, what goes into the logistic function of equation 2.
        recurrence_gate: [B, S, D] of the dtype of `x`, the same of equation 1.
        recurrent_param: [D], -Λ of equation 3, as RecurrentGemma keeps it; may be fp32 under a narrower `x`.
        reset: bool [B, S], where a sequence begins anew: nothing of the state before stays there, and the square root
            counts as 1. None resets nothing.
        initial_state: [B, D], the state before the first step; None for zeros.
        return_final_state: also return the state after the last step.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        [B, S, D] in the dtype of `x`; with `return_final_state` also [B, D], fp32 (float64 where `x` is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a backend that cannot run.
    """
    _check(x, input_gate, recurrence_gate, recurrent_param, reset, initial_state)
    backend = choose("rg_lru", impl, x, "", recurrent_param.dtype)
    if backend == "reference":
        y, final_state = reference.rg_lru(x, input_gate, recurrence_gate, recurrent_param, reset, initial_state)
    else:
        state = None if initial_state is None else dense(cast(initial_state, torch.float32))
        call = RgLru(x, input_gate, recurrence_gate, dense(recurrent_param), reset, state, kept_every=0)
        y, final_state = apply(GatedRecurrence, namespace_of(backend), call)
    return (y, final_state) if return_final_state else y


def _check(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, recurrent_param: Tensor, reset: Tensor | None,
    state: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 3:
        raise BadArgument(f"x: expected [B, S, D], got shape {tuple(x.shape)}")
    batch, steps, channels = x.shape
    for name, gate in (("input_gate", input_gate), ("recurrence_gate", recurrence_gate)):
        if gate.shape != x.shape or gate.dtype != x.dtype:
            raise BadArgument(
                f"{name}: expected {x.dtype} of shape {tuple(x.shape)} like x, got {gate.dtype} of {tuple(gate.shape)}"
            )
    check_vector("recurrent_param", recurrent_param, channels)
    if reset is not None and (reset.dtype != torch.bool or tuple(reset.shape) != (batch, steps)):
        raise BadArgument(f"reset: expected bool of shape {(batch, steps)}, got {reset.dtype} of {tuple(reset.shape)}")
    if state is not None and tuple(state.shape) != (batch, channels):
        raise BadArgument(f"initial_state: expected {(batch, channels)}, got {tuple(state.shape)}")
    check_floating(x=x, recurrent_param=recurrent_param, initial_state=state)
    check_same_device(
        x=x, input_gate=input_gate, recurrence_gate=recurrence_gate, recurrent_param=recurrent_param, reset=reset,
        initial_state=state,
    )  # fmt: skip
