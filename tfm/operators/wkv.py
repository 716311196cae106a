"""RWKV's attention by exponential decay: the operators and their gradients.

kernels/wkv.py gives the mathematics. Saved: what was given, and the state before every few steps, from which the
backward computes those between again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Row, joined, operator
from tfm.operators.recurrence import KEPT_EVERY, kept_states
from tfm.reference import wkv as reference

ROWS = (
    Row(("wkv",), "triton", FLOATS, max_columns=MANY),
    Row(("wkv",), "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
)


@operator("wkv")
class Wkv(NamedTuple):
    """y = (e^maximum numerator + e^(first + key) value) / (e^maximum denominator + e^(first + key)), step by step.

    Attributes:
        decay: [D], contiguous: the logarithm of the rate, -exp(decay) being added to the state's exponent at each step.
        first: [D], contiguous: what is added to the key of the step itself.
        key: [B, S, D], any strides.
        value: [B, S, D], any strides.
        initial_state: fp32 [3, B, D], contiguous: numerator, denominator and maximum; None where nothing came before.
        kept_every: steps from one state that is kept for the backward to the next; 0 keeps none.
    """

    decay: Tensor
    first: Tensor
    key: Tensor
    value: Tensor
    initial_state: Tensor | None
    kept_every: int

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns empty (y, final_state, kept): as `key` lies, fp32 [3, B, D], and fp32 [B, S / kept_every, 3, D] flat.

        kept has the state before the first step even where there is none; it is empty where nothing is kept.
        """
        batch, steps, channels = self.key.shape
        state = torch.empty((3, batch, channels), dtype=torch.float32, device=self.key.device)
        return torch.empty_like(self.key), state, kept_states(state, steps, self.kept_every)


class Cotangents(NamedTuple):
    """The gradients of y and, where it has users, of the final state, contiguous."""

    dy: Tensor
    dfinal_state: Tensor | None


class Given(NamedTuple):
    """What the forward was given, and the states that it kept."""

    decay: Tensor
    first: Tensor
    key: Tensor
    value: Tensor
    kept: Tensor
    kept_every: int


@operator("wkv")
class WkvBackward(joined("WkvBackward", Cotangents, Given)):  # type: ignore[misc]
    """The gradients of Wkv."""

    __slots__ = ()

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns empty (ddecay, dfirst, dkey, dvalue, dinitial_state), the last fp32 [3, B, D]."""
        batch, _, channels = self.key.shape
        state = torch.empty((3, batch, channels), dtype=torch.float32, device=self.key.device)
        ddecay, dfirst = torch.empty_like(self.decay), torch.empty_like(self.first)
        return ddecay, dfirst, torch.empty_like(self.key), torch.empty_like(self.value), state


class WeightedByDecay(Differentiable):
    """The operation that gives (y, final_state)."""

    arguments = Wkv
    learns = ("decay", "first", "key", "value", "initial_state")

    @staticmethod
    def forward(namespace, call, wanted):
        call = call._replace(kept_every=KEPT_EVERY) if any(wanted) else call
        y, final_state, kept = run(namespace, call)
        return Forward((y, final_state), (*call[:5], kept), None)

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (dy, dfinal_state), (*given, initial_state, kept) = grads, saved
        dy = torch.zeros_like(given[2]) if dy is None else dy
        dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
        *found, dinitial_state = run(namespace, WkvBackward(dy, dfinal_state, *given, kept, KEPT_EVERY))
        return *found, None if initial_state is None else dinitial_state

    @staticmethod
    def again(saved, options, grads):
        return reference.wkv, saved[:5]
