"""The sizes of calls whose host time is measured: any would do for the host, and these need little arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = torch.bfloat16
SENTENCES, LENGTH, HEADS, DIM = 2, 8, 2, 64
TOKENS = SENTENCES * LENGTH
WIDTH, HIDDEN, CLASSES = 64, 128, 96
# More keys than those kernels take that hold all of them on chip.
LONG = 300


def leaf(*shape: int) -> Tensor:
    """Returns random numbers that need a gradient."""
    return torch.randn(shape, dtype=HALF).requires_grad_()


def heads(length: int) -> Tensor:
    """Returns [B, H, S, D] as a projection has it: heads side by side in their rows."""
    return torch.randn(SENTENCES, length, HEADS, DIM, dtype=HALF).transpose(1, 2).requires_grad_()
