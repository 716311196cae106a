"""Settings of the cross-entropy of a linear layer: how many rows' logits are held at once, and by which kernels.

Two ways, M rows, D wide, V classes, on an H200 (bf16 matmuls 750-790 TFLOP/s by cuBLAS, memory 4.3 TB/s):

    stored    a chunk of logits by cuBLAS, one launch for the loss and dz in their place, dX and dW by cuBLAS:
              6 M D V flops with gradients, 2 M D V without; the launch moves 4 bytes a logit, 2 without gradients
    streamed  logits in registers alone, 2 M D V flops at 480-620 TFLOP/s; a backward would multiply them again, 8 M D V

With gradients the third more of products (0.73 ms of 2.2 at D = 1024, M = 8192, V = 32768) is twice what the stored
logits' traffic costs (0.28 ms): always stored. Without gradients the traffic costs 0.25 ms (write, read) where the
matmul takes 0.37 (D = 512) or 0.73 (D = 1024): streaming wins above 440 and 560 TFLOP/s.

Predictions, H200, bf16, 8192 rows, 32768 classes, smoothing 0.1, in ms; not yet measured:

    D       forward, streamed      forward and backward (logits, CE + dz, dX, dW, scaling)         of the matmuls' peak
    512     0.53  (520 TFLOP/s)    1.59 = 0.38 + 0.29 + 0.42 + 0.46 (fp32 sums of dW) + 0.04       65 %
    1024    0.92  (600 TFLOP/s)    2.74 = 0.74 + 0.29 + 0.78 + 0.86 + 0.07                         76 %

and 3.7 TB/s (86 % of copy) for the one launch over stored logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tfm.kernels.launch.rows import RowTiles
from tfm.kernels.launch.settings import Settings

MIB = 1 << 20
# Logits held at once: at least so much, at most so much, and between them a sixteenth of all of them. Each chunk reads
# and writes the fp32 sums of dW once, 8 D V bytes beside its 6 m D V flops: 12 % of the chunk's time at 128 MB of bf16
# and 32k classes if nothing hid it; more rows a chunk would cost memory that the loss is there to save.
FEWEST_BYTES, MOST_BYTES = 128 * MIB, 512 * MIB
# Rows of a matmul's tile: chunks of a multiple leave none half empty.
TILE_ROWS = 128
# Wider inputs give the matmul more to do for each logit than its traffic costs.
WIDEST_STREAMED = 1024


@dataclass(frozen=True)
class CrossEntropyTiles(Settings):
    """The tiles of a row of logits, or of the losses of all rows: `chunks` blocks of `block` elements.

    The logits' loops take `unroll` blocks a step, each a load in flight.
    """

    block: int
    chunks: int
    num_warps: int
    unroll: int = 1
    max_registers: int | None = None


@dataclass(frozen=True)
class StreamingTiles(Settings):
    """The tiles of logits that are folded as they are made: block_rows x block_classes, block_dim deep a step.

    A program folds `tiles` of them; the number of classes that makes must not depend on the rows.
    """

    block_rows: int
    block_classes: int
    block_dim: int
    tiles: int
    num_warps: int
    num_stages: int


def cross_entropy(
    classes: int, dtype: torch.dtype, has_bias: bool, has_softcap: bool, major: int
) -> CrossEntropyTiles:  # fmt: skip
    """Returns 8 elements a thread, one 16-byte load of bf16; three in flight where a thread does little else.

    What is under way should stay in the L2 cache (50 MB) until it is read again: 4 programs of 16 warps on each of 132
    multiprocessors hold 35 MB of bf16 rows at 32k classes; wider rows take one program of 32 warps, 35 MB at 128k.

    Args:
        has_bias: which is loaded besides.
        has_softcap: which computes enough to wait for.
        major: of the compute capability.
    """
    width = max(256, 1 << (classes - 1).bit_length())
    block = min(width, 4096 if classes <= 32768 else 8192)
    chunks, num_warps = -(-classes // block), block // 256
    if dtype == torch.float32 or has_softcap:
        return CrossEntropyTiles(block, chunks, num_warps)
    if has_bias:
        # As many as three programs of 16 warps have. Blackwell's assembler would spill 8 bytes under them.
        return CrossEntropyTiles(block, chunks, num_warps, max_registers=None if major == 10 else 40)
    # 32 registers are those of a multiprocessor full of warps; a program of 32 warps is to be alone there, and has 64.
    # Other chips' assemblers would spill 8 bytes under 32.
    max_registers = 64 if num_warps > 16 else 32 if major == 9 else None
    return CrossEntropyTiles(block, chunks, num_warps, unroll=3, max_registers=max_registers)


def mean_loss(rows: int) -> CrossEntropyTiles:
    """Returns the tiles of one program, which reads 12 bytes a row: about 3 us for 8,192 rows, and no atomics."""
    return CrossEntropyTiles(block=4096, chunks=-(-rows // 4096), num_warps=16)


def logits_rows(rows: int, classes: int, itemsize: int) -> int:
    """Returns how many rows' logits are held at once: chunks of nearly equal size, whole tiles of the matmul."""
    row_bytes = classes * itemsize
    budget = min(max(FEWEST_BYTES, rows * row_bytes // 16), MOST_BYTES)
    chunks = max(1, -(-rows * row_bytes // budget))
    return -(-rows // (chunks * TILE_ROWS)) * TILE_ROWS if chunks > 1 else rows


def streaming_cross_entropy(
    dim: int, dtype: torch.dtype, aligned: bool, plain: bool, major: int
) -> StreamingTiles | None:
    """Returns the tiles of the kernel that never stores logits; None where storing them is faster.

    Args:
        dim: columns of input and weight.
        dtype: theirs.
        aligned: their rows begin at multiples of 16 bytes, as the tensor memory accelerator asks.
        plain: neither bias nor softcap, which take registers.
        major: of the compute capability.
    """
    # fp32 is multiplied by cuBLAS, which obeys torch's choice of tf32. Without the accelerator of sm_90 and sm_100 the
    # loads are not pipelined.
    if dtype == torch.float32 or not aligned or dim > WIDEST_STREAMED or major not in (9, 10):
        return None
    # 8 tiles of 256 classes: 64 row tiles x 16 shares at 8,192 x 32,768 are 7.8 rounds of 132 programs, 97 % full.
    if major == 9 and plain:
        return StreamingTiles(128, 256, 64, tiles=8, num_warps=8, num_stages=4)
    return StreamingTiles(128, 128, 64, tiles=16, num_warps=8, num_stages=4 if major == 9 else 3)


def streaming_losses(rows: int, dim: int) -> RowTiles:
    """Returns tiles of the input's rows beside their targets' rows of the weight: 16 elements of each a thread."""
    block_dim = min(512, max(16, 1 << (dim - 1).bit_length()))
    block_rows = 2048 // block_dim
    programs, chunks = -(-rows // block_rows), -(-dim // block_dim)
    return RowTiles(programs, block_rows, block_dim, chunks, num_warps=4)
