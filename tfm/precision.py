"""bf16 for the matmuls of a step: what autocast computes, but one launch rounds all projections, not one for each.

A tiny model's step is a few hundred kernels. Under autocast alone 38 of them forward and as many backward would round
one weight or widen one gradient each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tfm.model import Transformer
from tfm.transforms import Recomputed, differentiable_by


def _recompute(ctx: Any, *gradients: Tensor) -> Recomputed:
    return lambda *weights: [weight.bfloat16() for weight in weights], [
        torch.zeros_like(gradient, dtype=torch.float32) for gradient in gradients
    ]


class Rounded(torch.autograd.Function):
    """Rounds fp32 weights to bf16, and widens their gradients again: the same bits as autocast's."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(_copies(weights, torch.bfloat16))

    @staticmethod
    @differentiable_by(_recompute)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(_copies(gradients, torch.float32))


def call(model: nn.Module, *arguments: Any) -> Tensor:
    """Returns `model(*arguments)` under autocast to bf16, the weights of its projections rounded together.

    Any module may be given; one that is no tfm.model.Transformer is left to autocast alone.
    """
    with torch.autocast(arguments[0].device.type, torch.bfloat16):
        if not isinstance(model, Transformer):
            return model(*arguments)
        weights = model.projection_weights()
        rounded = Rounded.apply(*weights.values())
        return functional_call(model, dict(zip(weights, rounded, strict=True)), arguments)


def _copies(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies
