"""A mixture of feed-forward experts (Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.reference.feed_forward import ACTIVATIONS


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    first: Sequence[Tensor] | Tensor,
    second: Sequence[Tensor] | Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    activation: str,
    gated: bool,
    of_any_values: bool,
) -> Tensor:
    """Computes tfm.ops.experts, one expert after the other.

    `of_any_values`: no shape may depend on the values of `index`, so that each expert gets all tokens.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in range(len(first)):
        chosen = index == expert
        has_expert = chosen.any(1)
        share = torch.where(chosen, weights, 0).sum(1, dtype=wide)[:, None]
        biases = [None if bias is None else bias[expert] for bias in (first_bias, second_bias)]
        parts: list[Any] = [first[expert], second[expert], *biases]
        if of_any_values:
            # Another expert's tokens may hold NaN, which would reach this one's gradients.
            kept = torch.where(has_expert[:, None], x, 0)
            result = torch.where(has_expert[:, None], _network(kept, *parts, activation, gated), 0)  # type: ignore[call-arg]
            y = y + result.to(wide) * share
        else:
            # An expert without tokens has gradients, too: zeros.
            tokens = has_expert.nonzero()[:, 0]
            result = _network(x[tokens], *parts, activation, gated).to(wide)  # type: ignore[call-arg]
            y = y.index_add(0, tokens, result * share[tokens])
    return y.to(x.dtype)


def _network(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    hidden = _linear(x, first, first_bias)
    if gated:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = ACTIVATIONS[activation](gate) * up
    else:
        hidden = ACTIVATIONS[activation](hidden)
    return _linear(hidden, second, second_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
