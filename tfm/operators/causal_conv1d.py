"""A causal convolution over each channel's own sequence: the operators and their gradients.

kernels/causal_conv1d.py gives the mathematics. Saved: what was given; the sum before the activation is computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfm.operators.autograd import Differentiable, Forward
from tfm.operators.calling import run
from tfm.operators.declaration import CPU_FLOATS, FLOATS, MANY, Row, joined, operator
from tfm.reference import causal_conv1d as reference

ROWS = (
    Row(("causal_conv1d",), "triton", FLOATS, max_columns=MANY),
    Row(("causal_conv1d",), "native", CPU_FLOATS, max_columns=MANY, device="cpu"),
)


@operator("causal_conv1d")
class CausalConv1d(NamedTuple):
    """y = activation(bias + Σ weight[k] x[t - W + 1 + k]) of each channel.

    Attributes:
        x: [B, D, S], any strides.
        weight: [D, W], contiguous.
        bias: [D], or None, as the state may be.
        initial_state: [B, D, W - 1], contiguous: the steps before the first.
        silu: whether the sum goes through SiLU.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    silu: bool

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Returns empty (y, final_state): y as `x` lies in memory, and the last W - 1 steps, [B, D, W - 1]."""
        batch, channels, _ = self.x.shape
        state = (batch, channels, self.weight.shape[1] - 1)
        return torch.empty_like(self.x), torch.empty(state, dtype=self.x.dtype, device=self.x.device)


class Cotangents(NamedTuple):
    """The gradients of y and, where it has users, of the final state."""

    dy: Tensor
    dfinal_state: Tensor | None


@operator("causal_conv1d")
class CausalConv1dBackward(joined("CausalConv1dBackward", Cotangents, CausalConv1d)):  # type: ignore[misc]
    """The gradients of CausalConv1d; the final state's is contiguous."""

    __slots__ = ()

    def outputs(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns empty (dx, dinitial_state, dparameters), the last fp32 [D W + D]: weight, then bias."""
        state = None if self.initial_state is None else torch.empty_like(self.initial_state)
        channels, width = self.weight.shape
        parameters = torch.empty(channels * (width + 1), dtype=torch.float32, device=self.x.device)
        return torch.empty_like(self.x), state, parameters


class Convolution(Differentiable):
    """The operation that gives (y, final_state)."""

    arguments = CausalConv1d
    learns = ("x", "weight", "bias", "initial_state")

    @staticmethod
    def forward(namespace, call, wanted):
        return Forward(run(namespace, call), call[:4], call.silu)

    @staticmethod
    def backward(namespace, saved, options, grads, wanted):
        (dy, dfinal_state), (x, weight, bias, _) = grads, saved
        dy = torch.zeros_like(x) if dy is None else dy
        dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
        dx, dinitial_state, dparameters = run(namespace, CausalConv1dBackward(dy, dfinal_state, *saved, options))
        dweight, dbias = dparameters.split((weight.numel(), len(weight)))
        return (
            dx,
            dweight.view_as(weight).to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            dinitial_state,
        )

    @staticmethod
    def again(saved, options, grads):
        def outputs(x, weight, bias, initial_state):
            return reference.causal_conv1d(x, weight, bias, initial_state, "silu" if options else None)

        return outputs, saved
