"""Settings of the norms: whole rows, forward and backward."""

from __future__ import annotations

from functools import lru_cache

from tfm.kernels.launch.rows import RowTiles, tile_count, width

# Columns at a time of a row that is too wide for the registers: 8 warps, each thread with up to 255 registers.
CHUNK = 4096


# Called at every launch, with the few shapes of a model again and again.
@lru_cache(maxsize=1024)
def forward(rows: int, columns: int, aligned: bool) -> RowTiles:
    """Returns tiles of which a program normalises one and ends: many small programs hide each other's loads.

    `aligned`: columns and row strides are multiples of 16, so that a thread's elements share an address.
    """
    # 4 warps with 16 elements a thread: two 16-byte loads of bf16 in flight, at less than 64 registers. Half of that
    # where an odd row stride takes an address for each element.
    block_rows, block_columns, chunks = _blocks(columns, 2048 if aligned else 1024, 16384 if aligned else 8192, CHUNK)
    num_warps = max(4, block_rows * block_columns // 512)
    return RowTiles(
        programs=tile_count(rows, block_rows),
        block_rows=block_rows,
        block_columns=block_columns,
        chunks=chunks,
        num_warps=num_warps,
        max_registers=64 if aligned and chunks == 1 else min(255, 2048 // num_warps),
    )


@lru_cache(maxsize=1024)
def backward(rows: int, columns: int, aligned: bool, crowded: bool, multiprocessors: int) -> RowTiles:
    """Returns tiles that two programs a multiprocessor stride over: the partial sums do not grow with the rows.

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
        programs=min(tile_count(rows, block_rows), 2 * multiprocessors),
        block_rows=block_rows,
        block_columns=block_columns,
        chunks=chunks,
        num_warps=num_warps,
        # 24 KB of bf16 on their way to each program, half of that beside more registers. The sums of a chunked row go
        # through memory: nothing may overtake them. What is not aligned does not go through shared memory.
        stages=1 if chunks > 1 or not aligned or block > 4096 else 2 if crowded or block > 2048 else 3,
        max_registers=128 if block <= 256 * num_warps else None,
    )


def _blocks(columns: int, tile: int, widest: int, chunk: int) -> tuple[int, int, int]:
    """Returns a block's rows, its columns and how many make a row: one, unless the row is wider than `widest`."""
    whole = width(columns)
    block_columns = whole if whole <= widest else chunk
    return max(1, tile // block_columns), block_columns, -(-columns // block_columns)
