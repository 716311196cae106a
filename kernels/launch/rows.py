"""Settings of kernels that work on whole rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# Columns at a time of a row that is too wide for the registers: 8 warps, each thread with up to 255 registers.
CHUNK = 4096


@dataclass(frozen=True)
class RowTiles:
    """How a kernel that normalises whole rows covers [rows, columns].

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


@dataclass(frozen=True)
class RotaryTiles:
    """`programs` of `block_tokens` tokens, for each `group` of heads.

    A head is two halves of at most `block_half` columns, and at most `block_rest` that are not turned.
    """

    programs: int
    block_tokens: int
    group: int
    block_half: int
    block_rest: int
    num_warps: int


# Called at every launch, with the few shapes of a model again and again.
@lru_cache(maxsize=1024)
def norm_forward(rows: int, columns: int, aligned: bool) -> RowTiles:
    """A program normalises one tile and ends: many small ones on a multiprocessor hide each other's loads.

    `aligned`: columns and row strides are multiples of 16, so that a thread's elements share an address.
    """
    # 4 warps with 16 elements a thread: two 16-byte loads of bf16 in flight, at less than 64 registers. Half of that
    # where an odd row stride takes an address for each element.
    block_rows, block_columns, chunks = _blocks(columns, 2048 if aligned else 1024, 16384 if aligned else 8192, CHUNK)
    num_warps = max(4, block_rows * block_columns // 512)
    return RowTiles(
        programs=_tiles(rows, block_rows),
        block_rows=block_rows,
        block_columns=block_columns,
        chunks=chunks,
        num_warps=num_warps,
        max_registers=64 if aligned and chunks == 1 else min(255, 2048 // num_warps),
    )


@lru_cache(maxsize=1024)
def norm_backward(rows: int, columns: int, aligned: bool, crowded: bool, multiprocessors: int) -> RowTiles:
    """Two programs a multiprocessor stride over the tiles, so that the partial sums do not grow with the rows.

    `aligned`: as in the forward. `crowded`: dx has another dtype than h, and so another layout, or there is a third sum
    beside the row.
    """
    # 8 warps: what two programs keep in flight must hide the memory's latency. Half the forward's width: the sums of
    # dweight and dbias lie beside the row. Fewer elements a thread where each takes more registers.
    if not aligned:
        tile, widest, chunk, per_warp = 1024, 1024, CHUNK // 4, 128
    elif crowded:
        tile, widest, chunk, per_warp = 2048, 4096, CHUNK // 2, 256
    else:
        tile, widest, chunk, per_warp = 2048, 8192, CHUNK, 512
    block_rows, block_columns, chunks = _blocks(columns, tile, widest, chunk)
    block = block_rows * block_columns
    num_warps = max(8, block // per_warp)
    return RowTiles(
        programs=min(_tiles(rows, block_rows), 2 * multiprocessors),
        block_rows=block_rows,
        block_columns=block_columns,
        chunks=chunks,
        num_warps=num_warps,
        # 24 KB of bf16 on their way to each program, half of that beside more registers. The sums of a chunked row go
        # through memory: nothing may overtake them. What is not aligned does not go through shared memory.
        stages=1 if chunks > 1 or not aligned or block > 4096 else 2 if crowded or block > 2048 else 3,
        max_registers=128 if block <= 256 * num_warps else None,
    )


@lru_cache(maxsize=1024)
def sum_partials(columns: int) -> RowTiles:
    """Columns of fp32 partial sums in 128-byte lines, 128 programs' sums at a time: three rounds on the largest GPU."""
    return RowTiles(programs=-(-columns // 32), block_rows=128, block_columns=32, chunks=1, num_warps=8)


def embedding_forward(rows: int, columns: int) -> RowTiles:
    """Tiles as of the norms' forward; `chunks` programs side by side share a row of more than 1,024 columns."""
    block_columns = min(_width(columns), 1024)
    block_rows = 2048 // block_columns
    chunks = -(-columns // block_columns)
    max_registers = 128 if columns % 16 else 64
    return RowTiles(_tiles(rows, block_rows), block_rows, block_columns, chunks, 4, max_registers=max_registers)


def embedding_backward(chunks: int, chunk: int, rows: int, columns: int) -> tuple[RowTiles, RowTiles]:
    """Of the kernel that adds up `chunks` times `chunk` tokens, and of the one that writes `rows` rows."""
    width = _width(columns)
    first, second = min(width, 128), min(width, 512)
    # A program takes as long as the most frequent of its rows: eight at most.
    block_rows = min(8, 2048 // second)
    return (
        RowTiles(chunks, chunk, first, -(-columns // first), num_warps=8, max_registers=128),
        RowTiles(_tiles(rows, block_rows), block_rows, second, -(-columns // second), num_warps=4, max_registers=168),
    )


def rotary(tokens: int, half: int, columns: int) -> RotaryTiles:
    """4 warps with 16 columns of a head a thread; 8 heads one after another, so that the angles are read for all."""
    block_half = _width(half)
    block_rest = _width(columns - 2 * half) if columns > 2 * half else 0
    block_tokens = max(1, 2048 // max(2 * block_half, block_rest))
    return RotaryTiles(-(-tokens // block_tokens), block_tokens, 8, block_half, block_rest, num_warps=4)


def _blocks(columns: int, tile: int, widest: int, chunk: int) -> tuple[int, int, int]:
    """Rows of a block, its columns, and how many make a row: the whole row where that is not wider than `widest`."""
    width = _width(columns)
    block_columns = width if width <= widest else chunk
    return max(1, tile // block_columns), block_columns, -(-columns // block_columns)


def _width(columns: int) -> int:
    """The power of two that holds `columns`; at least 16, two octets of the dropout mask."""
    return max(16, 1 << (columns - 1).bit_length())


def _tiles(rows: int, block_rows: int) -> int:
    """No rows still make one tile: its program stores the empty sums."""
    return max(1, -(-rows // block_rows))
