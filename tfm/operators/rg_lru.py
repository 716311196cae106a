"""The real-gated linear recurrent unit: the operators and their gradients.

kernels/rg_lru.py gives the mathematics. Saved: what was given, and the state before every few steps, from which the
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
from tfm.reference import rg_lru as reference

ROWS = (
    Row(("rg_lru",), "triton", FLOATS, max_columns=MANY),
    Row(("rg_lru",), "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
)


class Inputs(NamedTuple):
    """What both ways read.

    Attributes:
        x: [B, S, D], any strides, as both gates may have.
        input_gate: [B, S, D], before the logistic function.
        recurrence_gate: [B, S, D], before the logistic function.
        recurrent_param: [D], contiguous.
        reset: bool [B, S], any strides; None resets nothing.
    """

    x: Tensor
    input_gate: Tensor
    recurrence_gate: Tensor
    recurrent_param: Tensor
    reset: Tensor | None


class Before(NamedTuple):
    """The state before the first step, and how often states are kept.

    Attributes:
        initial_state: fp32 [B, D], contiguous; None for zeros.
        kept_every: steps from one state that is kept for the backward to the next; 0 keeps none.
    """

    initial_state: Tensor | None
    kept_every: int


@operator("rg_lru")
class RgLru(joined("RgLru", Inputs, Before)):  # type: ignore[misc]
    """h = a h + √(1 - a²) · logistic(input_gate) · x, step by step."""

    __slots__ = ()

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns empty (y, final_state, kept): as `x` lies, fp32 [B, D], and fp32 [B, S / kept_every, D] flat.

        kept has the state before the first step even where there is none; it is empty where nothing is kept.
        """
        batch, steps, channels = self.x.shape
        state = torch.empty((batch, channels), dtype=torch.float32, device=self.x.device)
        return torch.empty_like(self.x), state, kept_states(state, steps, self.kept_every)


class Cotangents(NamedTuple):
    """The gradients of y and, where it has users, of the final state, contiguous."""

    dy: Tensor
    dfinal_state: Tensor | None


class Kept(NamedTuple):
    """The states that the forward kept, and every how many steps."""

    kept: Tensor
    kept_every: int


@operator("rg_lru")
class RgLruBackward(joined("RgLruBackward", Cotangents, Inputs, Kept)):  # type: ignore[misc]
    """The gradients of RgLru."""

    __slots__ = ()

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns empty (dx, dinput_gate, drecurrence_gate, drecurrent_param, dinitial_state), the last fp32 [B, D]."""
        batch, _, channels = self.x.shape
        return (
            torch.empty_like(self.x),
            torch.empty_like(self.input_gate),
            torch.empty_like(self.recurrence_gate),
            torch.empty_like(self.recurrent_param),
            torch.empty((batch, channels), dtype=torch.float32, device=self.x.device),
        )


class GatedRecurrence(Differentiable):
    """The operation that gives (y, final_state)."""

    arguments = RgLru
    learns = ("x", "input_gate", "recurrence_gate", "recurrent_param", "initial_state")

    @staticmethod
    def forward(namespace, call, wanted):
        call = call._replace(kept_every=KEPT_EVERY) if any(wanted) else call
        y, final_state, kept = run(namespace, call)
        return Forward((y, final_state), (*call[:6], kept), None)

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (dy, dfinal_state), (*given, initial_state, kept) = grads, saved
        dy = torch.zeros_like(given[0]) if dy is None else dy
        dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
        *found, dinitial_state = run(namespace, RgLruBackward(dy, dfinal_state, *given, kept, KEPT_EVERY))
        return *found, None if initial_state is None else dinitial_state

    @staticmethod
    def again(saved, options, grads):
        *learning, reset, initial_state, _ = saved

        def outputs(x, input_gate, recurrence_gate, recurrent_param, initial_state):
            return reference.rg_lru(x, input_gate, recurrence_gate, recurrent_param, reset, initial_state)

        return outputs, (*learning, initial_state)
