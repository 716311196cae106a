"""What the settings of kernels over rows share: how a kernel covers a matrix, and those of the sums over its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class RowTiles:
    """How a kernel covers the rows of [rows, columns].

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

    @property
    def options(self) -> dict[str, int | None]:
        """What the compiler is told."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}


@lru_cache(maxsize=1024)
def sum_partials(columns: int) -> RowTiles:
    """Columns of fp32 partial sums in 128-byte lines, 128 programs' sums at a time: three rounds on the largest GPU."""
    return RowTiles(programs=-(-columns // 32), block_rows=128, block_columns=32, chunks=1, num_warps=8)


def width(columns: int) -> int:
    """The power of two that holds `columns`; at least 16, two octets of the dropout mask."""
    return max(16, 1 << (columns - 1).bit_length())


def tile_count(rows: int, block_rows: int) -> int:
    """How many tiles hold the rows; where there are none still one, whose program stores the empty sums."""
    return max(1, -(-rows // block_rows))
