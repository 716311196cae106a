"""RWKV's attention by exponential decay."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from tfm.autocast import cast
from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.wkv import WeightedByDecay, Wkv
from tfm.ops.backends import choose
from tfm.ops.checks import check_floating, check_same_device, check_vector
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import wkv as reference
from tfm.taping import dense


@overload
def wkv(
    decay: Tensor, first: Tensor, key: Tensor, value: Tensor, *, initial_state: Tensor | None = ...,
    return_final_state: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def wkv(
    decay: Tensor, first: Tensor, key: Tensor, value: Tensor, *, initial_state: Tensor | None = ...,
    return_final_state: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@door
def wkv(
    decay: Tensor,
    first: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Averages each channel's values over this step and those before it, weighted by their keys and their age.

    y[t] = (Σ_{i<t} e^(key[i] - (t - 1 - i) r) value[i] + e^(first + key[t]) value[t]) / (the same sums without values),
    with r = e^decay, in fp32 at least: the WKV operator of RWKV-4 (Peng et al. 2023, "RWKV", section 3.1.2, equation
    16), computed in the form that no key overflows (appendix D). Decoding hands each call's final state to the next as
    its initial state; so may any sequence be cut into pieces.

    A state is (numerator, denominator, maximum): the two sums are e^maximum times the first two. Before anything came
    it is (0, 0, -1e38).

    Args:
        decay: [D], the logarithm of the rate r, as RWKV's parameter `time_decay` is kept; may be fp32 under a narrower
            `key`.
        first: [D], the bonus of the step itself, RWKV's `time_first`; may be fp32, too.
        key: [B, S, D], floating point, any strides.
        value: [B, S, D], of the dtype of `key`, any strides.
        initial_state: [3, B, D], the state before the first step; None for the one before anything came.
        return_final_state: also return the state after the last step.
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        [B, S, D] in the dtype of `key`; with `return_final_state` also [3, B, D], fp32 (float64 where `key` is).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a backend that cannot run.
    """
    _check(decay, first, key, value, initial_state)
    backend = choose("wkv", impl, key, "", decay.dtype, first.dtype)
    if backend == "reference":
        y, final_state = reference.wkv(decay, first, key, value, initial_state)
    else:
        state = None if initial_state is None else dense(cast(initial_state, torch.float32))
        call = Wkv(dense(decay), dense(first), key, value, state, kept_every=0)
        y, final_state = apply(WeightedByDecay, namespace_of(backend), call)
    return (y, final_state) if return_final_state else y


def _check(decay: Tensor, first: Tensor, key: Tensor, value: Tensor, state: Tensor | None) -> None:
    if key.dim() != 3:
        raise BadArgument(f"key: expected [B, S, D], got shape {tuple(key.shape)}")
    batch, _, channels = key.shape
    if value.shape != key.shape or value.dtype != key.dtype:
        raise BadArgument(
            f"value: expected {key.dtype} of shape {tuple(key.shape)} like key, "
            f"got {value.dtype} of {tuple(value.shape)}"
        )
    check_vector("decay", decay, channels)
    check_vector("first", first, channels)
    if state is not None and tuple(state.shape) != (3, batch, channels):
        raise BadArgument(f"initial_state: expected {(3, batch, channels)}, got {tuple(state.shape)}")
    check_floating(key=key, decay=decay, first=first, initial_state=state)
    check_same_device(key=key, value=value, decay=decay, first=first, initial_state=state)
