"""Settings of grouped products, whose rows are sorted by expert: each expert's rows are cut into tiles of their own.

How many rows an expert gets is known on the device alone. So there are programs for as many tiles as there can be, and
those behind the last end at once. The tiles are those of tfm.kernels.launch.feed_forward, for the same reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tfm.kernels.launch.device import Chip
from tfm.kernels.launch.settings import Settings


@dataclass(frozen=True)
class GroupTiles(Settings):
    """Tiles of a grouped product, `block_depth` at a time, `num_stages` - 1 of these on their way.

    `row_tiles`: the most that all rows can have, those without an expert too. The epilogue takes a tile in `slices` of
    its columns.
    """

    row_tiles: int
    block_rows: int
    block_columns: int
    block_depth: int
    slices: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@lru_cache(maxsize=1024)
def products(rows: int, experts: int, dtype: torch.dtype, chip: Chip, heavy: bool = False) -> GroupTiles:
    """Returns tiles of products by an expert's weight: 128 rows where experts have as many on average, else 64.

    `heavy`: the epilogue is the backward's, which has no room beside a large tile in 128 registers a thread. Neither
    have chips whose tensor cores hold a product's first factor in registers.
    """
    large = dtype != torch.float32 and rows >= 96 * experts and chip.major in (9, 10) and not heavy
    block_rows, block_columns, block_depth = _blocks(dtype, large, chip)
    return GroupTiles(
        row_tiles=rows // block_rows + min(experts + 1, rows),
        block_rows=block_rows,
        block_columns=block_columns,
        block_depth=block_depth,
        slices=block_columns // 16,
        num_warps=8 if large else 4,
        num_stages=_stages(dtype, chip),
        # Two programs share a multiprocessor.
        max_registers=128 if large else None,
    )


@lru_cache(maxsize=1024)
def weight_gradient(dtype: torch.dtype, chip: Chip) -> GroupTiles:
    """Returns tiles of a weight's gradient: its rows and columns, summed over an expert's rows."""
    large = dtype != torch.float32
    block_rows, block_columns, block_depth = _blocks(dtype, large, chip)
    return GroupTiles(
        row_tiles=0,
        block_rows=block_rows,
        block_columns=block_columns,
        block_depth=block_depth,
        slices=1,
        num_warps=8 if large else 4,
        num_stages=_stages(dtype, chip),
    )


def _blocks(dtype: torch.dtype, large: bool, chip: Chip) -> tuple[int, int, int]:
    if dtype == torch.float32:
        return 64, 64, 32
    return 128 if large else 64, 128, 64 if chip.major in (9, 10) else 32


def _stages(dtype: torch.dtype, chip: Chip) -> int:
    return 3 if dtype == torch.float32 or chip.major in (9, 10) else 4


@dataclass(frozen=True)
class TokenTiles(Settings):
    """Tiles of tokens by columns of a pass over memory."""

    block_rows: int
    block_columns: int
    num_warps: int = 4


@lru_cache(maxsize=1024)
def elements(columns: int) -> TokenTiles:
    """Returns tiles of 2,048 elements, 16 a thread: two 16-byte loads of bf16 in flight."""
    block_columns = min(512, max(16, 1 << (columns - 1).bit_length()))
    return TokenTiles(2048 // block_columns, block_columns)
