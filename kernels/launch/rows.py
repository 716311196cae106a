"""Settings of kernels that work on whole rows."""

from __future__ import annotations

from dataclasses import dataclass

# Columns at a time of a row that is too wide for the registers: 8 warps, each thread with up to 255 registers.
CHUNK = 4096


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


def layer_norm_forward(rows: int, columns: int, aligned: bool) -> RowTiles:
    """A program normalises one tile and ends: many small ones on a multiprocessor hide each other's loads.

    `aligned`: columns and row strides are multiples of 16, so that a thread's elements share an address.
    """
    # 4 warps with 16 elements a thread: two 16-byte loads of bf16 in flight, at less than 64 registers. Half of that
    # where an odd row stride takes an address for each element.
    tile = 2048 if aligned else 1024
    return _row_tiles(rows, columns, aligned, tile, widest=16384, fewest_warps=4)


def layer_norm_backward(rows: int, columns: int, simple: bool, multiprocessors: int) -> RowTiles:
    """Two programs a multiprocessor stride over the tiles, so that the partial sums do not grow with the rows.

    `simple`: aligned as in the forward, and dx of the dtype of h; two dtypes take two layouts, and more registers.
    """
    # 8 warps: what two programs keep in flight must hide the memory's latency. Half the forward's width: the sums of
    # dweight and dbias lie beside the row.
    return _row_tiles(rows, columns, simple, tile=2048, widest=8192, fewest_warps=8, most_programs=2 * multiprocessors)


def sum_partials(columns: int) -> RowTiles:
    """Columns of fp32 partial sums in 128-byte lines, 128 programs' sums at a time: three rounds on the largest GPU."""
    return RowTiles(programs=-(-columns // 32), block_rows=128, block_columns=32, chunks=1, num_warps=8)


def _row_tiles(
    rows: int, columns: int, simple: bool, tile: int, widest: int, fewest_warps: int, most_programs: int | None = None
) -> RowTiles:
    # At least 16 columns: two octets of the dropout mask.
    width = max(16, 1 << (columns - 1).bit_length())
    # Half the width where each element takes more registers.
    widest = widest if simple else widest // 2
    block_columns = width if width <= widest else CHUNK
    block_rows = max(1, tile // block_columns)
    # No rows still make one program: it stores the empty sums.
    tiles = max(1, -(-rows // block_rows))
    return RowTiles(
        programs=tiles if most_programs is None else min(tiles, most_programs),
        block_rows=block_rows,
        block_columns=block_columns,
        chunks=-(-columns // block_columns),
        num_warps=max(fewest_warps, block_rows * block_columns // 512),
    )
