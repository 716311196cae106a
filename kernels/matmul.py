"""The parts that kernels with matrix products share: fp32 precision, the order of tiles, the loop over the depth.

Tiles follow one another in bands of BAND row tiles: the programs that run at once then read few row tiles of one matrix
and few column tiles of the other, which stay in the second-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of the 264 programs that run at once on 132 multiprocessors, bands of 8 row tiles make 8 x 33: near a square.
BAND = tl.constexpr(8)


def precision(dtype: torch.dtype) -> str:
    """Returns how tl.dot forms products of this dtype: of fp32 as torch's own setting of TF32 says."""
    # Not `allow_tf32`, which raises where TF32 was set through fp32_precision.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def tile_of(program, row_tiles, column_tiles):
    """Returns the row tile and the column tile of a program."""
    band = program // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = program % (BAND * column_tiles)
    return band * BAND + within % height, within // height


@triton.jit
def multiply(
    a, b, b_step, depth, EVEN: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PRECISION: tl.constexpr = "ieee"
):  # fmt: skip
    """Multiplies a tile of rows by one of columns, summed over the depth in fp32.

    `a` holds pointers to the rows [BLOCK_ROWS, 1], `b` to the first BLOCK_DEPTH steps of the columns [BLOCK_DEPTH,
    BLOCK_COLUMNS], `b_step` elements apart. Every row and column must be readable: the caller wraps those outside.
    EVEN: the depth is a multiple of BLOCK_DEPTH.
    """
    step = tl.arange(0, BLOCK_DEPTH)
    a += step[None, :]
    total = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        if EVEN:
            left, right = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=step[None, :] < depth - start, other=0.0)
            right = tl.load(b, mask=step[:, None] < depth - start, other=0.0)
        # fp32 is multiplied in full unless asked: beside cuBLAS, where torch allows tf32, that does the product.
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a += BLOCK_DEPTH
        b += BLOCK_DEPTH * b_step
    return total


@triton.jit
def halves(tile):
    """Splits a tile into its left and right half: the same registers."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
