"""What stands beside attention: the gradient of its bias, its weights, its mask as bits.

T5's bias [1, 8, 512, 512] for 32 sequences has 512 tiles of 64 x 64, each the sum over 32 sequences: 17 GFLOP beside
the 60 of the whole step, which takes some 300 µs on an H200. The weights of 64 x 12 heads of 512 tokens are 403 MB in
bf16, 94 µs at 4.3 TB/s. A mask [64, 1, 512, 512] of bools is 17 MB, 4 µs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import bench_attention
from benchmarks.device import DEVICE
from benchmarks.shapes import Sequences as Shape
from benchmarks.suite import BOTH, FORWARD, OURS, Peer, Suite, Work
from tfm import ops
from tfm.kernels.launch import AttentionTiles, RowTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Queries, keys, warps, stages, and the expected share of the step.
BIAS_TILES = (
    (64, 64, 8, 2, 1.00),
    (64, 64, 4, 2, 0.98),
    (64, 64, 8, 3, 0.99),
    (64, 32, 4, 2, 1.02),
    (32, 64, 4, 2, 1.01),
    (128, 64, 8, 2, 1.00),
)
# Programs that share a tile, as multiples of today's.
SPLITS = ((0.5, 1.02), (2, 1.00), (4, 1.01))
# Queries, keys, warps of a tile of weights.
WEIGHT_TILES = (
    (64, 64, 4, 1.00),
    (64, 128, 4, 0.98),
    (64, 128, 8, 0.98),
    (128, 128, 8, 0.99),
    (32, 64, 4, 1.03),
    (128, 64, 4, 1.00),
)
# Queries and keys at a time, warps. The mask's launch is a sixth of the step.
MASK_TILES = ((128, 128, 8, 1.00), (64, 128, 4, 1.00), (256, 128, 16, 0.99), (128, 64, 4, 0.98), (128, 32, 4, 0.99))


def bias_tiles(
    current: AttentionTiles, arguments: Arguments, queries: int, keys: int, warps: int, stages: int
) -> Iterator[AttentionTiles]:
    yield AttentionTiles(queries, keys, warps, stages)


def splits(current: int, arguments: Arguments, programs: float) -> Iterator[int]:
    yield min(max(1, int(current * programs)), arguments["members"])


def weight_tiles(
    current: AttentionTiles, arguments: Arguments, queries: int, keys: int, warps: int
) -> Iterator[AttentionTiles]:
    yield replace(current, block_queries=queries, block_keys=keys, num_warps=warps)


def mask_tiles(current: RowTiles, arguments: Arguments, queries: int, keys: int, warps: int) -> Iterator[RowTiles]:
    yield replace(current, block_rows=queries, block_columns=keys, num_warps=warps)


def weights(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return ops.attention(query, key, value, return_weights=True)


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return ops.attention(query, key, value, mask)


def with_mask(size: Shape) -> tuple[Tensor, ...]:
    """Of each sequence's queries and keys nine in ten pairs may attend."""
    mask = torch.rand(size.batch, 1, size.length, size.length, device=DEVICE) < 0.9
    return *bench_attention.qkv(size), mask


WEIGHTS = Suite("attention", (), {OURS: Peer(weights)}, bench_attention.qkv, lambda *_: Work())
MASKED = Suite("attention", (), {OURS: Peer(masked)}, with_mask, lambda *_: Work())

T5, FEW_PLACES = Shape(32, 512, 8, 64, "bias"), Shape(64, 128, 8, 64, "bias")
REHEARSAL, PLAIN = Shape(2, 17, 1, 16, "bias"), Shape(1, 65, 1, 16, "none")

SWEEPS = (
    LaunchSweep(
        "bias_gradient", bench_attention.PADDED, BOTH,
        question="220 to 240 registers a thread let one program of 8 warps run: do two of 4 warps hide the loads, whose"
        " round is one behind?",
        prediction="A quarter of the step, 75 µs for T5's 32 x 512; two programs of 4 warps gain 2 % of the step.",
        sizes=[T5, FEW_PLACES], rehearsal=REHEARSAL, table=BIAS_TILES, settings=bias_tiles,
    ),
    LaunchSweep(
        "bias_splits", bench_attention.PADDED, BOTH,
        question="512 programs are 3.9 rounds of 132: do twice as many, whose partial sums pass through memory once"
        " more, fill the last round better?",
        prediction="T5's 8 MB of partial sums cost what the round gains: 1 % either way. Where 32 places are shared by"
        " 16 programs each, half as many leave the GPU idle and lose 2 % of the step.",
        sizes=[T5, FEW_PLACES], rehearsal=REHEARSAL, table=SPLITS, settings=splits,
    ),
    LaunchSweep(
        "attention_weights", WEIGHTS, FORWARD,
        question="A program stores 64 rows of 128 bytes: do rows of 256 bytes come nearer the copy's bandwidth?",
        prediction="Today's store 85 % of it, 110 µs beside 65 of attention; 128 keys a tile gain 2 % of both.",
        sizes=[Shape(64, 512, 12, 64, "none"), Shape(64, 128, 8, 64, "none")], rehearsal=PLAIN,
        table=WEIGHT_TILES, settings=weight_tiles,
    ),
    LaunchSweep(
        "mask_bits", MASKED, FORWARD,
        question="256 programs go down all queries in four steps, each of which waits for memory: do more and narrower"
        " ones end sooner?",
        prediction="6 µs of a step of 35, of which memory takes 4; half the keys a program gain 0.7 µs, 2 %.",
        sizes=[Shape(64, 512, 2, 64, "none")], rehearsal=PLAIN, table=MASK_TILES, settings=mask_tiles,
    ),
)  # fmt: skip
