"""Makes the inputs of benchmarks: random numbers on the device that is measured, and tokens distributed as in texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.device import DEVICE, DTYPE


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Returns normal numbers in the dtype that is measured; they need a gradient."""
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE).requires_grad_()


def heads(batch: int, length: int, heads: int, head_dim: int) -> Tensor:
    """Returns `random` [B, H, S, D] that lies in memory as [B, S, H, D], as the view of a projection's output does."""
    return random(batch, length, heads, head_dim).detach().transpose(1, 2).requires_grad_()


def integers(values: Sequence[int]) -> Tensor:
    """Returns the values as int32 [len(values)]."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def text(tokens: int, vocabulary: int) -> Tensor:
    """Returns int64 [tokens] under Zipf's law in Mandelbrot's form: three words make up a tenth of them."""
    shares = 1.0 / (torch.arange(vocabulary, device=DEVICE) + 2.7)
    return torch.multinomial(shares, tokens, replacement=True)


def padding_mask(lengths: Tensor, longest: int) -> Tensor:
    """Turns lengths [B] into the additive mask [B, 1, 1, longest], which spares SDPA the conversion of a bool mask."""
    padding = torch.arange(longest, device=DEVICE) >= lengths[:, None]
    return torch.zeros(padding.shape, dtype=DTYPE, device=DEVICE).masked_fill_(padding, -torch.inf)[:, None, None]
