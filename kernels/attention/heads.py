"""Tensors of heads, [B, H, S, D] or packed [N, H, D], and the tiles of their rows that kernels load and store.

A head dim is a tile, or the sum of two, (D, first, rest, 1), and PART says which: 0 the columns below `first`, 1 those
from there on. One wider than both is so many slices of `first` columns, (D, first, 0, slices), and PART the number of
one: a program makes one slice of its results, and forms products over all of them anew.
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
def load_rows(head, x, row, inside, DIMS: tl.constexpr, PART):
    """Loads part of these rows [R] of a head of `x`: [R, BLOCK], 0 beyond D and in rows that are not `inside` [R].

    `head` is where it begins. None as `inside` loads all rows, without a mask.
    """
    BLOCK: tl.constexpr = DIMS[1] if DIMS[3] > 1 else DIMS[1 + PART]
    IS_WHOLE: tl.constexpr = DIMS[0] % BLOCK == 0 if DIMS[3] > 1 else DIMS[0] >= PART * DIMS[1] + BLOCK
    column = PART * DIMS[1] + tl.arange(0, BLOCK)
    address = head + row.to(tl.int64)[:, None] * x.s + column[None, :] * x.d
    mask = None
    if inside is not None:
        mask = inside[:, None]
    if not IS_WHOLE:
        is_column = (column < DIMS[0])[None, :]
        mask = is_column if mask is None else mask & is_column
    return tl.load(address, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(head, x, value, row, inside, DIMS: tl.constexpr, PART):
    """Stores `value` [R, BLOCK] where load_rows reads, in the rows [R] that are `inside`."""
    BLOCK: tl.constexpr = DIMS[1] if DIMS[3] > 1 else DIMS[1 + PART]
    column = PART * DIMS[1] + tl.arange(0, BLOCK)
    address = head + row.to(tl.int64)[:, None] * x.s + column[None, :] * x.d
    tl.store(address, value, mask=inside[:, None] & (column < DIMS[0])[None, :])


@triton.jit
def sums_of(ROWS: tl.constexpr, DIMS: tl.constexpr, PART: tl.constexpr):
    """Returns fp32 zeros [ROWS, BLOCK] to sum part of a head dim in; few, and unused, where it has no second part."""
    BLOCK: tl.constexpr = DIMS[1 + PART] if DIMS[1 + PART] > 0 else 16
    return tl.zeros([ROWS, BLOCK], tl.float32)


@triton.jit
def products_of(
    a_head, a, a_row, is_a, b_head, b, b_row, is_b, DIMS: tl.constexpr, PRECISION: tl.constexpr,
    STEP: tl.constexpr = 64,
):  # fmt: skip
    """Computes the products of rows [A] of one head with rows [B] of another, [A, B], from memory.

    Of a head dim that is slices, STEP columns are multiplied at once.
    """
    if DIMS[3] > 1:
        STEPS: tl.constexpr = (DIMS[0], STEP, 0, 2)
        products = tl.zeros([a_row.shape[0], b_row.shape[0]], tl.float32)
        for step in range((DIMS[0] + STEP - 1) // STEP):
            left = load_rows(a_head, a, a_row, is_a, STEPS, step)
            right = load_rows(b_head, b, b_row, is_b, STEPS, step)
            products = tl.dot(left, tl.trans(right), products, input_precision=PRECISION)
    else:
        left = load_rows(a_head, a, a_row, is_a, DIMS, 0)
        right = load_rows(b_head, b, b_row, is_b, DIMS, 0)
        products = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    return products


@triton.jit
def row_products(a_head, a, b_head, b, row, inside, DIMS: tl.constexpr):
    """Computes the product of each row [R] of one head with that of another, slice by slice."""
    products = tl.zeros([row.shape[0]], tl.float32)
    for part in range(DIMS[3]):
        left = load_rows(a_head, a, row, inside, DIMS, part)
        right = load_rows(b_head, b, row, inside, DIMS, part)
        products += tl.sum(left.to(tl.float32) * right.to(tl.float32), axis=1)
    return products
