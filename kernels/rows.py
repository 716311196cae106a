"""The parts that kernels over the rows of a matrix share: its shape and strides, its tiles, the sums over its rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels.launch import rows as settings
from tfm.kernels.tape import Tape


def as_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """Returns memory that holds `x` as [rows, columns] with neighbouring columns side by side, and its row stride.

    `x` itself where it is contiguous, whatever its shape: a kernel needs the address alone. Copied only where no one
    row stride describes `x`. None stays None.
    """
    if x is None:
        return None, 0
    if x.is_contiguous():
        return x, x.shape[-1]
    matrix = x.reshape(-1, x.shape[-1])
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    return matrix, matrix.stride(0)


def side_by_side(x: Tensor | None) -> Tensor | None:
    """Returns `x` with neighbouring columns side by side, copied where they are not; None stays None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


@triton.jit
def cover(row, rows, chunk, columns, BLOCK_COLUMNS: tl.constexpr):
    """Returns the columns of a chunk [1, BLOCK_COLUMNS], and which elements of the tile lie inside the matrix."""
    column = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return column, (row < rows) & (column < columns)


@triton.jit
def load(pointer, inside):
    """Loads the elements of a tile in fp32, 0 outside."""
    # weight and bias are read for each row: as vectors they get a layout of their own, and the tile is moved into it.
    return tl.load(tl.broadcast_to(pointer, inside.shape), mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partials, first, second, third, programs, columns,
    PARTS: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program sums BLOCK_COLUMNS columns of a part of partials [programs, PARTS, columns], always in one order."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK_PROGRAMS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, programs, BLOCK_PROGRAMS):
        program = start + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        partial = partials + (program * PARTS + part) * columns + column[None, :]
        total += tl.load(partial, mask=(program < programs) & (column < columns)[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if part == 0:
        if first is not None:
            tl.store(first + column, result, mask=column < columns)
    elif part == 1:
        if second is not None:
            tl.store(second + column, result, mask=column < columns)
    else:
        if third is not None:
            tl.store(third + column, result, mask=column < columns)


def sum_partials(tape: Tape, partials: Tensor, *sums: Tensor | None) -> None:
    """Fills each of `sums` [columns] with the sum of its part of partials [programs, parts, columns], rounded once.

    As many `sums` as parts, at most three; None leaves a part unread by its user. One launch.
    """
    programs, parts, columns = partials.shape
    tiles = settings.sum_partials(columns)
    first, second, third = (*sums, None, None)[:3]
    tape.launch(
        sum_partials_kernel, (tiles.programs, parts), tiles.options,
        partials=partials, first=first, second=second, third=third, programs=programs, columns=columns,
        PARTS=parts, BLOCK_PROGRAMS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns,
    )  # fmt: skip
