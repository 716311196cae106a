"""Settings of the embedding: rows of tables, and the rows of their gradients."""

from __future__ import annotations

from tfm.kernels.launch.rows import RowTiles, tile_count, width


def forward(rows: int, columns: int) -> RowTiles:
    """Returns tiles as in the norms' forward; `chunks` programs side by side share a row of more than 1,024 columns."""
    block_columns = min(width(columns), 1024)
    block_rows = 2048 // block_columns
    chunks = -(-columns // block_columns)
    max_registers = 128 if columns % 16 else 64
    return RowTiles(tile_count(rows, block_rows), block_rows, block_columns, chunks, 4, max_registers=max_registers)


def backward(chunks: int, chunk: int, rows: int, columns: int) -> tuple[RowTiles, RowTiles]:
    """Returns the tiles to add up `chunks` times `chunk` tokens, and those to write `rows` rows."""
    whole = width(columns)
    first, second = min(whole, 128), min(whole, 512)
    # A program takes as long as the most frequent of its rows: eight at most.
    block_rows = min(8, 2048 // second)
    return (
        RowTiles(chunks, chunk, first, -(-columns // first), num_warps=8, max_registers=128),
        RowTiles(
            tile_count(rows, block_rows), block_rows, second, -(-columns // second), num_warps=4, max_registers=168
        ),
    )
