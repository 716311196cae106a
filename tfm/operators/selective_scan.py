"""Mamba's selective scan: the operators and their gradients.

kernels/selective_scan.py gives the mathematics. Saved: what was given, and the state before every few steps, from which
the backward computes those between again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Row, joined, operator
from tfm.operators.recurrence import kept_states
from tfm.reference import selective_scan as reference

# Steps from one kept state to the next. A state is N numbers a channel, so fewer are kept than of other recurrences: at
# N = 16 they take 4 bytes for each number of `x`.
KEPT_EVERY = 16
# Numbers of a channel's state that the kernels have room for.
MAX_STATE = 64

ROWS = (
    Row(("selective_scan",), "triton", FLOATS, max_columns=MANY),
    Row(("selective_scan",), "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
)


class Inputs(NamedTuple):
    """What both ways read.

    Attributes:
        x: [B, S, D], any strides, as `delta` and `z` may have.
        delta: [B, S, D], before its bias and the softplus.
        A: [D, N], contiguous.
        B: [B, S, N], any strides, as `C` may have.
        C: [B, S, N].
        D: [D], contiguous; None for 0.
        z: [B, S, D], the gate before its SiLU; None gates nothing.
        delta_bias: [D], contiguous; None for 0.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


class Before(NamedTuple):
    """The state before the first step, and how often states are kept.

    Attributes:
        initial_state: fp32 [B, D, N], contiguous; None for zeros.
        kept_every: steps from one state that is kept for the backward to the next; 0 keeps none.
    """

    initial_state: Tensor | None
    kept_every: int


@operator("selective_scan")
class SelectiveScan(joined("SelectiveScan", Inputs, Before)):  # type: ignore[misc]
    """h = e^(Δ A) h + Δ B x, y = (C · h + D x) SiLU(z), step by step; Δ = softplus(delta + delta_bias)."""

    __slots__ = ()

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns empty (y, final_state, kept): as `x` lies, fp32 [B, D, N], and fp32 [B, S / kept_every, D, N] flat.

        kept has the state before the first step even where there is none; it is empty where nothing is kept. In what
        order its numbers lie is the backend's affair.
        """
        batch, steps, channels = self.x.shape
        state = torch.empty((batch, channels, self.A.shape[1]), dtype=torch.float32, device=self.x.device)
        return torch.empty_like(self.x), state, kept_states(state, steps, self.kept_every)


class Cotangents(NamedTuple):
    """The gradients of y and, where it has users, of the final state, contiguous."""

    dy: Tensor
    dfinal_state: Tensor | None


class Kept(NamedTuple):
    """The states that the forward kept, and every how many steps."""

    kept: Tensor
    kept_every: int


@operator("selective_scan")
class SelectiveScanBackward(joined("SelectiveScanBackward", Cotangents, Inputs, Kept)):  # type: ignore[misc]
    """The gradients of SelectiveScan."""

    __slots__ = ()

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Returns empty (dx, ddelta, dB, dC, dz, dparameters, dinitial_state).

        dparameters: fp32 [N + 2, D] flat: each column of A, then D and delta_bias. The last: fp32 [B, D, N].
        """
        batch, _, channels = self.x.shape
        states, device = self.A.shape[1], self.x.device
        return (
            torch.empty_like(self.x),
            torch.empty_like(self.delta),
            torch.empty_like(self.B),
            torch.empty_like(self.C),
            None if self.z is None else torch.empty_like(self.z),
            torch.empty((states + 2) * channels, dtype=torch.float32, device=device),
            torch.empty((batch, channels, states), dtype=torch.float32, device=device),
        )


class Scan(Differentiable):
    """The operation that gives (y, final_state)."""

    arguments = SelectiveScan
    learns = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

    @staticmethod
    def forward(namespace, call, wanted):
        call = call._replace(kept_every=KEPT_EVERY) if any(wanted) else call
        y, final_state, kept = run(namespace, call)
        return Forward((y, final_state), (*call[:9], kept), None)

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (dy, dfinal_state), (*given, initial_state, kept) = grads, saved
        dy = torch.zeros_like(given[0]) if dy is None else dy
        dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
        call = SelectiveScanBackward(dy, dfinal_state, *given, kept, KEPT_EVERY)
        dx, ddelta, dB, dC, dz, dparameters, dinitial_state = run(namespace, call)
        A, D, delta_bias = call.A, call.D, call.delta_bias
        dA, dD, dbias = dparameters.view(-1, len(A)).split((A.shape[1], 1, 1))
        return (
            dx,
            ddelta,
            dA.t().to(A.dtype),
            dB,
            dC,
            None if D is None else dD[0].to(D.dtype),
            dz,
            None if delta_bias is None else dbias[0].to(delta_bias.dtype),
            None if initial_state is None else dinitial_state,
        )

    @staticmethod
    def again(saved, options, grads):
        return reference.selective_scan, saved[:9]
