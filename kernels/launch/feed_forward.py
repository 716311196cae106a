"""Settings of matmuls with an epilogue, and of the element-wise kernels that stand beside cuBLAS instead.

The tiles: two programs of 128 x 128 share a multiprocessor (at most 128 registers a thread, 96 of 227 KB), so that
one's epilogue, 20 to 70 instructions an element, runs beside the other's product. One program of 128 x 256 would read a
quarter less, but leave the tensor cores idle meanwhile: at a depth of 512 for half of the time.

Which of the two ways: tiles of 128 x 128 do 64 operations for each byte that they read. The second-level cache of an
H100 gives at least 7.9 TB/s (what 128 x 256 reach at 674 TFLOP/s), so that Triton multiplies at up to 505 TFLOP/s where
cuBLAS, which shares tiles within a cluster, does 770. The epilogue in turn is free beside the product, and the
element-wise kernel takes 0.9 to 2.1 ps an element (4.3 TB/s for 4 to 8 bytes, or 2.9 · 10¹³ instructions a second).
Both take as long where 2 · depth · (1/505 - 1/770) ps is that much: at a depth of 700 for ReLU forward, of 1,000 for
ReLU backward, of 1,200 and 1,500 for GELU with dropout.

Blocks may depend on the rows here, as cuBLAS's do: each element is summed over the depth in the same order by all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tfm.kernels.launch.device import Chip
from tfm.kernels.launch.settings import Settings

DEEPEST = 1024


@dataclass(frozen=True)
class MatmulTiles(Settings):
    """The tiles of a matmul over [rows, columns]: `programs`, `block_depth` at a time, `num_stages` - 1 on their way.

    The epilogue takes a tile in `slices` of its columns. Where a matmul computes gate and up, `block_columns` counts
    both. `max_registers` a thread; None for as many as the compiler likes.
    """

    programs: int
    block_rows: int
    block_columns: int
    block_depth: int
    slices: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class ElementTiles(Settings):
    """The tiles of an element-wise kernel over [rows, columns]: each program goes down `tiles` of a strip."""

    programs: int
    block_rows: int
    block_columns: int
    tiles: int
    num_warps: int


# From the largest: the first that has a program for each multiprocessor is the fastest.
SIZES = ((128, 128), (64, 128), (64, 64), (64, 32))


@lru_cache(maxsize=1024)
def linear_activation(
    rows: int, columns: int, depth: int, gated: bool, dtype: torch.dtype, aligned: bool, chip: Chip
) -> MatmulTiles | None:
    """Returns the tiles of the forward matmul; None where cuBLAS and an element-wise kernel are faster.

    `columns` and row strides are `aligned` where they are multiples of 16 elements.
    """
    if not _suits_epilogue(depth, dtype, aligned):
        return None
    tiles = _matmul_tiles(rows, 2 * columns if gated else columns, chip)
    # The gated epilogue holds half as much an element as the backward's: slices twice as wide fit the registers.
    return replace(tiles, slices=tiles.block_columns // 32) if gated else tiles


@lru_cache(maxsize=1024)
def linear_activation_backward(
    rows: int, columns: int, depth: int, dtype: torch.dtype, aligned: bool, chip: Chip
) -> MatmulTiles | None:
    """Returns the tiles of the matmul that gives the pre-activation's gradient; None as above."""
    return _matmul_tiles(rows, columns, chip) if _suits_epilogue(depth, dtype, aligned) else None


@lru_cache(maxsize=1024)
def activation_dropout(rows: int, columns: int) -> ElementTiles:
    """Returns tiles of 16 elements a thread: two 16-byte loads of bf16 in flight."""
    return _element_tiles(rows, columns, tiles=1)


@lru_cache(maxsize=1024)
def activation_dropout_backward(rows: int, columns: int) -> ElementTiles:
    """Returns 16 of those tiles stacked: a partial sum for each 64 rows, or for more where rows are short."""
    return _element_tiles(rows, columns, tiles=16)


def _suits_epilogue(depth: int, dtype: torch.dtype, aligned: bool) -> bool:
    # fp32 goes to cuBLAS, which alone uses tf32 where torch allows it, and uses FMA instructions better where not.
    return dtype != torch.float32 and aligned and depth <= DEEPEST


def _matmul_tiles(rows: int, columns: int, chip: Chip) -> MatmulTiles:
    for block_rows, block_columns in SIZES:
        programs = -(-rows // block_rows) * -(-columns // block_columns)
        if programs >= chip.multiprocessors:
            break
    # 99 KB a multiprocessor is what small chips have.
    large_memory = chip.major in (9, 10)
    return MatmulTiles(
        programs=programs,
        block_rows=block_rows,
        block_columns=block_columns,
        block_depth=64 if large_memory else 32,
        slices=block_columns // 16,
        num_warps=8 if block_rows == 128 else 4,
        num_stages=3 if large_memory else 4,
        max_registers=128 if block_rows == 128 else None,
    )


def _element_tiles(rows: int, columns: int, tiles: int) -> ElementTiles:
    # At least 16 columns: two octets of the dropout mask.
    block_columns = min(512, max(16, 1 << (columns - 1).bit_length()))
    block_rows = 2048 // block_columns
    return ElementTiles(
        programs=-(-rows // (block_rows * tiles)) * -(-columns // block_columns),
        block_rows=block_rows,
        block_columns=block_columns,
        tiles=tiles,
        num_warps=4,
    )
