"""What kernels over the rows of a matrix share: its shape and strides, its tiles, the sums over its rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tfm.kernels import launch


def as_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """`x` as [rows, columns] with neighbouring columns side by side, and its row stride; None stays None.

    Copied only where no one row stride describes `x`.
    """
    if x is None:
        return None, 0
    matrix = x.reshape(-1, x.shape[-1])
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    return matrix, matrix.stride(0)


@triton.jit
def cover(row, rows, chunk, columns, BLOCK_COLUMNS: tl.constexpr):
    """The columns of a chunk [1, BLOCK_COLUMNS], and which elements of the tile lie inside the matrix."""
    column = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return column, (row < rows) & (column < columns)


@triton.jit
def load(pointer, inside):
    """The elements of a tile in fp32, 0 outside."""
    # weight and bias are read for each row: as vectors they get a layout of their own, and the tile is moved into it.
    return tl.load(tl.broadcast_to(pointer, inside.shape), mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partials, dweight, dbias, programs, columns,
    BLOCK_PROGRAMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program sums BLOCK_COLUMNS columns of partials [programs, 2, columns], always in the same order."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    weight_sum = tl.zeros([BLOCK_PROGRAMS, BLOCK_COLUMNS], tl.float32)
    bias_sum = tl.zeros([BLOCK_PROGRAMS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, programs, BLOCK_PROGRAMS):
        program = start + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        partial = partials + program * 2 * columns + column[None, :]
        inside = (program < programs) & (column < columns)[None, :]
        weight_sum += tl.load(partial, mask=inside, other=0.0)
        bias_sum += tl.load(partial + columns, mask=inside, other=0.0)
    if dweight is not None:
        tl.store(dweight + column, tl.sum(weight_sum, axis=0), mask=column < columns)
    if dbias is not None:
        tl.store(dbias + column, tl.sum(bias_sum, axis=0), mask=column < columns)


def sum_partials(partials: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> None:
    """Fills dweight and dbias [columns] with the sums of partials [programs, 2, columns], each rounded once."""
    programs, _, columns = partials.shape
    tiles = launch.sum_partials(columns)
    sum_partials_kernel[(tiles.programs,)](
        partials=partials, dweight=dweight, dbias=dbias, programs=programs, columns=columns,
        BLOCK_PROGRAMS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, num_warps=tiles.num_warps,
    )  # fmt: skip
