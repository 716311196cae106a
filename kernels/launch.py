"""Launch settings as pure functions of the problem: no autotuning, the same on every run, testable without a GPU.

Block sizes never depend on the number of rows, so that a row's numbers do not change with the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowTiles:
    """How a kernel that normalises whole rows covers [rows, columns].

    `programs` run at once, each on tiles of `block_rows` rows; a row is `chunks` blocks of `block_columns` columns.
    """

    programs: int
    block_rows: int
    block_columns: int
    chunks: int
    num_warps: int


def layer_norm_forward(rows: int, columns: int) -> RowTiles:
    """A program normalises one tile and ends; many small ones on a multiprocessor hide each other's loads."""
    # 16 elements a thread: two 16-byte loads of bf16 in flight, four of fp32. 32 fit a thread's 64 registers.
    return _row_tiles(rows, columns, tile=2048, widest=32768)


def layer_norm_backward(rows: int, columns: int, multiprocessors: int) -> RowTiles:
    """Two programs a multiprocessor stride over the tiles, so that the partial sums do not grow with the rows."""
    # Twice the forward's tile: 8 warps each keep as many bytes in flight as the two programs can hold in registers.
    # Above 8192 columns the sums of dweight and dbias no longer fit beside the row: rows are cut into chunks.
    return _row_tiles(rows, columns, tile=4096, widest=8192, most_programs=2 * multiprocessors)


def sum_partials(columns: int) -> RowTiles:
    """Columns of fp32 partial sums in 128-byte lines, 128 programs' sums at a time: three rounds on the largest GPU."""
    return RowTiles(programs=-(-columns // 32), block_rows=128, block_columns=32, chunks=1, num_warps=8)


def _row_tiles(rows: int, columns: int, tile: int, widest: int, most_programs: int | None = None) -> RowTiles:
    # At least 16 columns: an octet of the dropout mask for each half of the narrowest row.
    width = max(16, 1 << (columns - 1).bit_length())
    block_columns = min(width, widest)
    block_rows = max(1, tile // block_columns)
    # No rows still make one program: it stores the empty sums.
    tiles = max(1, -(-rows // block_rows))
    return RowTiles(
        programs=tiles if most_programs is None else min(tiles, most_programs),
        block_rows=block_rows,
        block_columns=block_columns,
        chunks=width // block_columns,
        num_warps=min(32, block_rows * block_columns // 512),
    )


def multiprocessors(device: torch.device) -> int:
    """Of `device`; the interpreter is given two, so that its programs, too, stride over several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def as_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """`x` as [rows, columns] with neighbouring columns side by side, and its row stride; None stays None.

    Copied only where no one row stride describes `x`.
    """
    if x is None:
        return None, 0
    matrix = x.reshape(-1, x.shape[-1])
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    return matrix, matrix.stride(0)
