"""Tensors of heads, [B, H, S, D] or packed [N, H, D], and the tiles of their rows that kernels load and store.

A head dim is a tile, or the sum of two, (D, first, rest), and PART says which: 0 the columns below `first`, 1 those
from there on.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Heads(NamedTuple):
    """A tensor of heads and its strides; packed sequences are told apart by their rows, and b is 0."""

    data: Tensor
    b: int
    h: int
    s: int
    d: int


def heads_of(x: Tensor | None) -> Heads | None:
    """Returns a tensor of heads with its strides; None where absent."""
    if x is None:
        return None
    if x.dim() == 4:
        return Heads(x, *x.stride())
    return Heads(x, 0, x.stride(1), x.stride(0), x.stride(2))


@triton.jit
def head_of(x, sequence, head, first):
    """Returns a pointer to row `first` of one (sequence, head), all three int64."""
    return x.data + sequence * x.b + head * x.h + first * x.s


@triton.jit
def load_rows(head, x, row, inside, DIMS: tl.constexpr, PART: tl.constexpr):
    """Loads part of these rows [R] of a head of `x`: [R, BLOCK], 0 beyond D and in rows that are not `inside` [R].

    `head` is where it begins. None as `inside` loads all rows, without a mask.
    """
    BLOCK: tl.constexpr = DIMS[1 + PART]
    FIRST: tl.constexpr = DIMS[1] if PART else 0
    column = FIRST + tl.arange(0, BLOCK)
    address = head + row.to(tl.int64)[:, None] * x.s + column[None, :] * x.d
    mask = None
    if inside is not None:
        mask = inside[:, None]
    if DIMS[0] < FIRST + BLOCK:
        is_column = (column < DIMS[0])[None, :]
        mask = is_column if mask is None else mask & is_column
    return tl.load(address, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(head, x, value, row, inside, DIMS: tl.constexpr, PART: tl.constexpr):
    """Stores `value` [R, BLOCK] where load_rows reads, in the rows [R] that are `inside`."""
    FIRST: tl.constexpr = DIMS[1] if PART else 0
    column = FIRST + tl.arange(0, DIMS[1 + PART])
    address = head + row.to(tl.int64)[:, None] * x.s + column[None, :] * x.d
    tl.store(address, value, mask=inside[:, None] & (column < DIMS[0])[None, :])


@triton.jit
def sums_of(ROWS: tl.constexpr, DIMS: tl.constexpr, PART: tl.constexpr):
    """Returns fp32 zeros [ROWS, BLOCK] to sum part of a head dim in; few, and unused, where it has no second part."""
    BLOCK: tl.constexpr = DIMS[1 + PART] if DIMS[1 + PART] > 0 else 16
    return tl.zeros([ROWS, BLOCK], tl.float32)
