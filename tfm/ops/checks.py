"""What the operations check of their arguments, once for all backends. Messages say what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor


def check(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def check_dropout(p: float) -> None:
    check(0.0 <= p <= 1.0, f"dropout_p: expected a probability in [0, 1], got {p}")


def check_columns(x: Tensor) -> None:
    check(x.dim() > 0, "x: expected at least one dimension, got a scalar")


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors given lie on the device of the first."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, device in given.items():
        check(device == first, f"{name}: expected a tensor on {first} as {first_name}, got one on {device}")


def check_floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            check(tensor.is_floating_point(), f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    """`tensor`, where given, is of shape [size]."""
    if tensor is not None:
        check(tuple(tensor.shape) == (size,), f"{name}: expected shape ({size},), got {tuple(tensor.shape)}")


def check_integers(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            integral = tensor.dtype in (torch.int32, torch.int64)
            check(integral, f"{name}: expected int32 or int64, got {tensor.dtype}")
