"""Rotation of queries and keys: which of ours does what a model's own function does, found by trying it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tfm import ops

Rotation = Callable[..., tuple[Tensor, Tensor]]


def _turned(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, columns: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos[..., :columns], sin[..., :columns]
    if unsqueeze_dim == 2:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    turned: Any = ops.rotary(query, key, cos, sin, interleaved=interleaved)
    return (turned[0].transpose(1, 2), turned[1].transpose(1, 2)) if unsqueeze_dim == 2 else turned


def rotate_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Pairs column i with i + R/2, by tables of two equal halves (Llama and its kin)."""
    return _turned(q, k, cos, sin, unsqueeze_dim, cos.shape[-1] // 2, False)


def rotate_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Pairs column 2i with 2i + 1, by tables of two equal halves (GLM)."""
    return _turned(q, k, cos, sin, unsqueeze_dim, cos.shape[-1] // 2, True)


def rotate_by_narrow_tables(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Pairs column i with i + R/2, by tables of R/2 columns (gpt-oss)."""
    return _turned(q, k, cos, sin, unsqueeze_dim, cos.shape[-1], False)


def rotate_into_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Turns columns 2i and 2i + 1, and leaves all first ones before all second ones (DeepSeek)."""
    turned = _turned(q, k, cos, sin, unsqueeze_dim, cos.shape[-1] // 2, True)
    return _halved(turned[0]), _halved(turned[1])


def _halved(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


ROTATIONS: tuple[Rotation, ...] = (rotate_halves, rotate_neighbours, rotate_by_narrow_tables, rotate_into_halves)


@cache
def rotation_of(theirs: Any) -> Rotation | None:
    """Returns the rotation of ours that does what `theirs` does on a trial; None where none does."""
    angles = torch.arange(12.0).view(1, 3, 4) / 7
    halves = angles.cos().tile(2), angles.sin().tile(2)
    narrow = angles.cos(), angles.sin()
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 1, 3, 8, generator=generator)
    for ours in ROTATIONS:
        tables = narrow if ours is rotate_by_narrow_tables else halves
        try:
            expected = theirs(q, k, *tables)
        except Exception:
            continue
        with torch.no_grad():
            found = ours(q, k, *tables)
        if all(x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in zip(found, expected, strict=True)):
            return ours
    return None
