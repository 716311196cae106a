"""Mamba's selective scan."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from tfm.autocast import cast
from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.selective_scan import MAX_STATE, Scan, SelectiveScan
from tfm.ops.backends import choose
from tfm.ops.checks import check_floating, check_same_device, check_vector
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import selective_scan as reference
from tfm.taping import dense


@overload
def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., initial_state: Tensor | None = ..., return_final_state: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., initial_state: Tensor | None = ..., return_final_state: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@door
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Carries N numbers a channel through the steps, of which each step says how much stays, comes in and is seen.

    h[t] = e^(Δ[t] A) h[t - 1] + Δ[t] x[t] B[t] and y[t] = (C[t] · h[t] + D x[t]) · SiLU(z[t]) with
    Δ = softplus(delta + delta_bias), in fp32 at least, rounded once: the selective state space model of Mamba (Gu and
    Dao 2023, "Mamba", section 3.2, equations 2 and 4, discretised as in section 3.6), with all that is element-wise
    around its recurrence, in one pass. Decoding hands each call's final state to the next as its initial state; so may
    any sequence be cut into pieces.

    Args:
        x: [B, S, D], floating point, any strides: [B, D, S] transposed is read where it lies, as all below are.
        delta: [B, S, D] of the dtype of `x`, the step's size before its bias and the softplus.
        A: [D, N], N from 1 to 64, what decays; below 0 in a model. May be fp32 under a narrower `x`.
        B: [B, S, N] of the dtype of `x`, what `x` adds to each number of a state.
        C: [B, S, N] of the dtype of `x`, how much of each number of a state is seen.
        D: [D], how much of `x` goes past the state; may be fp32, too. None for none.
        z: [B, S, D] of the dtype of `x`, a gate before its SiLU; None for none.
        delta_bias: [D], may be fp32, too; None for 0.
        initial_state: [B, D, N], the state before the first step; None for zeros.
        return_final_state: also return the state after the last step.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        [B, S, D] in the dtype of `x`; with `return_final_state` also [B, D, N], fp32 (float64 where `x` is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a backend that cannot run.
    """
    _check(x, delta, A, B, C, D, z, delta_bias, initial_state)
    too_large = f"expected a state of at most {MAX_STATE} numbers, got {A.shape[1]}" if A.shape[1] > MAX_STATE else ""
    others = [None if given is None else given.dtype for given in (A, D, delta_bias)]
    backend = choose("selective_scan", impl, x, too_large, *others)
    if backend == "reference":
        y, final_state = reference.selective_scan(x, delta, A, B, C, D, z, delta_bias, initial_state)
    else:
        state = None if initial_state is None else dense(cast(initial_state, torch.float32))
        call = SelectiveScan(x, delta, dense(A), B, C, dense(D), z, dense(delta_bias), state, kept_every=0)
        y, final_state = apply(Scan, namespace_of(backend), call)
    return (y, final_state) if return_final_state else y


def _check(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, state: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 3:
        raise BadArgument(f"x: expected [B, S, D], got shape {tuple(x.shape)}")
    batch, steps, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise BadArgument(f"A: expected [{channels}, N], got shape {tuple(A.shape)}")
    states = A.shape[1]
    for name, given, last in (("delta", delta, channels), ("z", z, channels), ("B", B, states), ("C", C, states)):
        if given is not None and (given.dtype != x.dtype or tuple(given.shape) != (batch, steps, last)):
            raise BadArgument(
                f"{name}: expected {x.dtype} like x of shape {(batch, steps, last)}, "
                f"got {given.dtype} of {tuple(given.shape)}"
            )
    check_vector("D", D, channels)
    check_vector("delta_bias", delta_bias, channels)
    if state is not None and tuple(state.shape) != (batch, channels, states):
        raise BadArgument(f"initial_state: expected {(batch, channels, states)}, got {tuple(state.shape)}")
    check_floating(x=x, A=A, D=D, delta_bias=delta_bias, initial_state=state)
    check_same_device(
        x=x, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=state
    )  # fmt: skip
