"""The position-wise feed-forward network ("Attention Is All You Need", section 3.3, equation 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.reference.dropout import dropout


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "quick_gelu": _quick_gelu,
    "relu_squared": _relu_squared,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """Computes tfm.ops.feed_forward."""
    return _linear(linear_activation(x, w1, b1, activation, dropout_p, seed, site), w2, b2)


def linear_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """Computes tfm.ops.linear_activation."""
    return dropout(ACTIVATIONS[activation](_linear(x, weight, bias)), dropout_p, seed, site)


def gated_feed_forward(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Computes tfm.ops.gated_feed_forward."""
    if up_weight is None:
        pre = _linear(x, gate_weight, gate_bias)
    else:
        pre = torch.cat((_linear(x, gate_weight, gate_bias), _linear(x, up_weight, up_bias)), -1)
    return _linear(gated_activation(pre, activation, dropout_p, seed, site), down_weight, down_bias)


def gated_activation(pre: Tensor, activation: str, dropout_p: float, seed: Tensor | None, site: int) -> Tensor:
    """Computes the hidden layer of pre-activations [..., 2 · columns], gate first."""
    gate, up = pre.chunk(2, -1)
    return dropout(ACTIVATIONS[activation](gate) * up, dropout_p, seed, site)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
