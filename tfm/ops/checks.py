"""Checks of the operations' arguments, once for all backends. Messages say what was expected and what came.

A message is formatted only where it is raised: torch.compile makes a graph for each size that is formatted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfm.errors import BadArgument
from tfm.transforms import is_differentiated


def check_dropout(p: float) -> None:
    check_numbers(dropout_p=p)
    if not 0.0 <= p <= 1.0:
        raise BadArgument(f"dropout_p: expected a probability in [0, 1], got {p}")


def check_numbers(**numbers: float | Tensor | None) -> None:
    """Refuses NaN, and tensors with a gradient, which an operation of numbers would lose without a word.

    Dynamo has met the numbers then: one that it met inside a Function first, it would not let out.
    """
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            if is_differentiated(number):
                raise BadArgument(f"{name}: expected a number, got a tensor that needs a gradient")
        elif number is not None and number != number:
            raise BadArgument(f"{name}: expected a number, got nan")


def check_columns(x: Tensor) -> None:
    if x.dim() == 0:
        raise BadArgument("x: expected at least one dimension, got a scalar")


def check_same_device(**tensors: Tensor | None) -> None:
    """Checks that all tensors given lie on the device of the first."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, device in given.items():
        if device != first:
            raise BadArgument(f"{name}: expected a tensor on {first} like {first_name}, got one on {device}")


def check_floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise BadArgument(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    """Checks that `tensor`, where given, is of shape [size]."""
    if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != size):
        raise BadArgument(f"{name}: expected shape ({size},), got {tuple(tensor.shape)}")


def check_integers(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise BadArgument(f"{name}: expected int32 or int64, got {tensor.dtype}")


def check_softcap(softcap: float | None) -> None:
    check_numbers(softcap=softcap)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {softcap}")


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Tells whether a tensor of `shape` expands to one of shape `to`."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(have == 1 or have == want for have, want in pairs)
