"""Kernels with one fault each, which the memory checker must find, and their sound twins, which it must not accuse."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x, y, n, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + column, 2.0 * tl.load(x + column, mask=column < n), mask=column < n)


@triton.jit
def off_by_one_kernel(x, y, n, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + column, tl.load(x + column, mask=column <= n), mask=column < n)


@triton.jit
def long_store_kernel(x, y, n, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + column, tl.load(x + column, mask=column < n))


@triton.jit
def wrong_length_kernel(x, y, rows, columns, BLOCK: tl.constexpr):
    """The mask of the row's columns holds the rows."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + column, mask=column < columns)
    tl.store(y + row * columns + column, value, mask=column < rows)


@triton.jit
def rows_kernel(x, y, rows, columns, x_stride, MASKED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies BLOCK_ROWS rows a program; without MASKED those beyond the last row, too."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < columns
    if MASKED:
        inside &= row < rows
    tl.store(y + row * columns + column, tl.load(x + row * x_stride + column, mask=inside), mask=inside)


@triton.jit
def every_other_row_kernel(x, y, columns, x_stride, BLOCK: tl.constexpr):
    """Rows 0, 2, ...: their addresses are reckoned in 32 bits."""
    row, column = 2 * tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + column, mask=column < columns)
    tl.store(y + tl.program_id(0) * columns + column, value, mask=column < columns)


@triton.jit
def reversed_kernel(x, y, n, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = x[n - FIRST - i]: FIRST is 1; with 2 the last element asks for x[-1]."""
    column = tl.arange(0, BLOCK)
    tl.store(y + column, tl.load(x + n - FIRST - column, mask=column < n), mask=column < n)


@triton.jit
def gather_kernel(x, index, y, n, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    source = tl.load(index + column, mask=column < n, other=0)
    tl.store(y + column, tl.load(x + source, mask=column < n), mask=column < n)


@triton.jit
def one_row_kernel(x, y, n, BLOCK: tl.constexpr):
    """Every program writes the same row, of the same values."""
    column = tl.arange(0, BLOCK)
    tl.store(y + column, tl.load(x + column, mask=column < n), mask=column < n)


@triton.jit
def last_wins_kernel(y):
    tl.atomic_xchg(y, tl.program_id(0))


@triton.jit
def neighbour_kernel(x, y, n, BLOCK: tl.constexpr):
    """In place: a program reads the element before its own, which another writes."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(x + column - 1, mask=(column > 0) & (column < n), other=0.0)
    tl.store(x + column, before + 1.0, mask=column < n)
    tl.store(y + column, before, mask=column < n)


@triton.jit
def handed_over_kernel(partials, total, programs, BLOCK: tl.constexpr):
    """The last program adds up what all of them write, as if they were done."""
    program = tl.program_id(0)
    tl.store(partials + program, 1.0)
    if program == programs - 1:
        place = tl.arange(0, BLOCK)
        tl.store(total, tl.sum(tl.load(partials + place, mask=place < programs, other=0.0)))


@triton.jit
def own_sums_kernel(x, partials, n, START: tl.constexpr, BLOCK: tl.constexpr):
    """Each program adds its elements to its own sum, which START writes first."""
    program = tl.program_id(0)
    if START:
        tl.store(partials + program, 0.0)
    for _ in range(2):
        column = program * BLOCK + tl.arange(0, BLOCK)
        tl.store(
            partials + program, tl.load(partials + program) + tl.sum(tl.load(x + column, mask=column < n, other=0.0))
        )


@triton.jit
def holes_kernel(x, y, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Writes every STEP-th element."""
    column = tl.arange(0, BLOCK) * STEP
    tl.store(y + column, tl.load(x + column, mask=column < n), mask=column < n)


@triton.jit
def atomic_sum_kernel(x, total, n, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(x + column, mask=column < n, other=0)))


@triton.jit
def atomic_after_store_kernel(x, total, n, BLOCK: tl.constexpr):
    """The first program sets the sum to 0, to which all add."""
    if tl.program_id(0) == 0:
        tl.store(total, 0)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total, tl.sum(tl.load(x + column, mask=column < n, other=0)))


@triton.jit
def words_kernel(x, y, offset):
    """A word of four bytes at any byte."""
    tl.store(y, tl.load((x + offset).to(tl.pointer_type(tl.int32))))


@triton.jit
def block_pointer_kernel(x, y, rows, columns, CHECKED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.make_block_ptr(x, (rows, columns), (columns, 1), (0, 0), (BLOCK, BLOCK), (1, 0))
    if CHECKED:
        value = tl.load(place, boundary_check=(0, 1), padding_option="zero")
    else:
        value = tl.load(place)
    tl.store(y, tl.sum(value))


@triton.jit
def descriptor_kernel(x, y, BLOCK: tl.constexpr):
    tl.store(y, tl.sum(x.load([0, 0])))


@triton.jit
def deep_load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def deep_kernel(x, y, n, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(y + column, deep_load(x + column, column < n + 1), mask=column < n)
