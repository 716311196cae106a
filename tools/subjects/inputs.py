"""Tensors for the subjects' small passes, of sizes that are no multiples of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DROPOUT_P = 0.1
# No multiples of tiles; COLUMNS and WIDTH are multiples of 16, as matmuls want. WIDE rows do not fit the registers.
ROWS, COLUMNS, WIDTH, CLASSES, WIDE = 35, 80, 144, 1031, 8193
# Columns that matmuls' tiles divide.
EVEN = 128
SHAPES = ((ROWS, COLUMNS), (3, WIDE))
LENGTHS = (1, 19, 66)
# Keys that are too many for the kernels of short sequences, and as many as csrc's for GPUs take.
LONG, SHORT = 300, 256
# Keys and queries that fit the kernels of short sequences in every dtype.
FEW = 17
HEADS, KEY_HEADS, HEAD_DIM = 2, 1, 40

Outputs = Tensor | tuple[Tensor, ...]


class Tensors:
    """Random tensors of one dtype on one device; each remembers to be differentiated.

    `short`: attention is that of csrc on GPUs: few keys, no bias that learns, no weights.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, short: bool = False) -> None:
        self.device, self.dtype, self.short = device, dtype, short
        self.leaves: list[Tensor] = []

    def __call__(self, *shape: int) -> Tensor:
        leaf = torch.randn(shape, device=self.device).to(self.dtype).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def biases(self, *shape: int) -> Tensor:
        """Returns random biases, which learn where attention's may."""
        return self(*shape).detach() if self.short else self(*shape)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, device=self.device)


Pass = Callable[[Tensors], Iterator[Outputs]]
