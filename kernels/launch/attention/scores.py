"""Settings of kernels that form the scores of attention again: the gradient of its bias, its weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from tfm.kernels.launch.attention.any_length import AttentionTiles

# Programs that a bias gradient is split into: two to four on each multiprocessor of the largest GPUs. The same on every
# GPU, so that the sums' order is, too; and all that partial sums take, in tiles.
BIAS_PROGRAMS = 512


def bias_gradient(dim: int, dtype: torch.dtype, major: int) -> AttentionTiles:
    """`dim`: the wider of D and Dv; `major`: of the compute capability.

    8 warps: the sums, the bias, scores and their gradients are 16 registers a thread each at 64 x 64; with every rule
    it takes 220 to 240, so one program on a multiprocessor, its loads one round ahead where their addresses fit, too.
    """
    if dtype == torch.float32:
        return AttentionTiles(32, 32, 8, 2)
    if dim > 128:
        return AttentionTiles(16, 32, 8, 1)
    if major == 9 or (major == 10 and dim <= 64):
        return AttentionTiles(64, 64, 8, 2)
    if major == 10:
        return AttentionTiles(64, 32, 8, 2)
    return AttentionTiles(64, 32, 8, 2) if dim <= 64 else AttentionTiles(32, 32, 8, 1)


def relative_bias_gradient(dim: int, dtype: torch.dtype, major: int) -> AttentionTiles:
    """As `bias_gradient`, in squares: all tiles at one offset from the diagonal then have the same distances.

    In fp32 the distances' registers beside wide heads would spill at 32.
    """
    tiles = bias_gradient(dim, dtype, major)
    side = 16 if dtype == torch.float32 and dim > 64 else min(tiles.block_queries, tiles.block_keys)
    return replace(tiles, block_queries=side, block_keys=side)


def bias_splits(places: int, members: int) -> int:
    """Returns how many programs share the `members` of each of so many `places`, tiles of the bias."""
    return min(max(1, BIAS_PROGRAMS // max(1, places)), max(1, members))


def attention_weights(dtype: torch.dtype, major: int) -> AttentionTiles:
    """Returns one tile a program, gone once it is stored: several on a multiprocessor hide each other's loads."""
    if dtype == torch.float32:
        return AttentionTiles(32, 32, 4, 1)
    return AttentionTiles(64, 64, 8 if major == 10 else 4, 1)
