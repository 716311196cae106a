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
    hidden = ACTIVATIONS[activation](_linear(x, w1, b1))
    return _linear(dropout(hidden, dropout_p, seed, site), w2, b2)


def gated_feed_forward(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor | None,
    down_weight: Tensor,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """Computes tfm.ops.gated_feed_forward."""
    if up_weight is None:
        gate_weight, up_weight = gate_weight.chunk(2)
    hidden = ACTIVATIONS[activation](_linear(x, gate_weight, None)) * _linear(x, up_weight, None)
    return _linear(dropout(hidden, dropout_p, seed, site), down_weight, None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
