"""Settings that all kernels over rows share: how tiles cover a matrix, and how sums over its rows are added up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tfm.kernels.launch.settings import Settings


@dataclass(frozen=True)
class RowTiles(Settings):
    """The tiles of a kernel over the rows of [rows, columns].

    `programs` run at once, each on tiles of `block_rows` rows; a row is `chunks` blocks of `block_columns` columns.
    A program that strides over tiles has `stages` - 1 of them on their way from memory while it works on another.
    `max_registers` a thread; None leaves the number to the compiler, which may rather spill a word or two than let a
    multiprocessor hold one program less.
    """

    programs: int
    block_rows: int
    block_columns: int
    chunks: int
    num_warps: int
    stages: int = 1
    max_registers: int | None = None


@lru_cache(maxsize=1024)
def sum_partials(columns: int) -> RowTiles:
    """Returns tiles of 128-byte lines of fp32 partial sums of 128 programs: three rounds on the largest GPU."""
    return RowTiles(programs=-(-columns // 32), block_rows=128, block_columns=32, chunks=1, num_warps=8)


def width(columns: int) -> int:
    """Returns the power of two that holds `columns`; at least 16, two octets of the dropout mask."""
    return max(16, 1 << (columns - 1).bit_length())


def tile_count(rows: int, block_rows: int) -> int:
    """Returns the number of tiles that hold the rows; at least one, whose program stores the empty sums."""
    return max(1, -(-rows // block_rows))
