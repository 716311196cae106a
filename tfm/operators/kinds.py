"""Kinds of calls, by what torch knows of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

# Addresses that are multiples of this are what Triton compiles for.
ALIGNMENT = 16
PLAIN = (Tensor, torch.nn.Parameter)
# It gives its attributes by a function of Python's: to find it takes as long as they do.
_products = torch.backends.cuda.matmul


class Kind:
    """One kind of call, and what is kept for it, None at first."""

    __slots__ = ("is_met", "kept")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # torch.compile asks the same of a graph's inputs, in C++: 0.05 µs a tensor.
        sizes: list[Any] = [list(x.shape) for x in tensors]
        strides: list[Any] = [list(x.stride()) for x in tensors]
        self.is_met = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        self.kept: Any = None


class Kinds:
    """What is kept for kinds of calls, at most so many.

    Two calls are of one kind where their keys are equal and their tensors alike in class, shape, strides, dtype,
    device, whether they need a gradient, and whatever decides about torch's dispatch, as signs that are turned lazily.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self.found: dict[Any, list[Kind]] = {}

    def find(self, key: Any, tensors: Sequence[Tensor]) -> Kind | None:
        """Returns the kind of a call; None where it is new."""
        if len(set(map(id, tensors))) < len(tensors):
            key, tensors = _once_each(key, tensors)
        for kind in self.found.get(key, ()):
            if kind.is_met(*tensors):
                return kind
        return None

    def add(self, key: Any, tensors: Sequence[Tensor]) -> Kind:
        """Adds the kind of a call; where there would be too many, all others are dropped."""
        if self.count >= self.most:
            self.clear()
        key, tensors = _once_each(key, tensors)
        kind = Kind(tensors)
        self.found.setdefault(key, []).append(kind)
        self.count += 1
        return kind

    def clear(self) -> None:
        """Drops all."""
        self.found.clear()
        self.count = 0


def _once_each(key: Any, tensors: Sequence[Tensor]) -> tuple[Any, Sequence[Tensor]]:
    """Returns the tensors without those that come again, which TensorGuards refuses, and a key that says which do."""
    different = {id(x): x for x in tensors}
    if len(different) == len(tensors):
        return key, tensors
    places = [*different]
    return (key, tuple(places.index(id(x)) for x in tensors)), [*different.values()]


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Tells whether launches made for these tensors read what they hold, and serve most others of their kind best.

    A tensor whose sign is turned lazily, or which is zero without memory, is torch's dispatcher's to resolve.
    """
    return all(
        x.__class__ in PLAIN and not x.is_neg() and not x._is_zerotensor() and x.data_ptr() % ALIGNMENT == 0
        for x in tensors
    )


def precision_of(x: Tensor) -> str | None:
    """Returns how torch is to form products of tensors like `x`, which launches follow; None where it has no choice."""
    return _products.fp32_precision if x.dtype is torch.float32 else None
