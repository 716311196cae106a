"""Attention of any length: tiles of queries and keys, and how many loads of the next ones are on their way.

A product of tensor cores waits for the exponentials of the one before it, unless another program's or warp group's
products fill the gap. Published for an H100 without a mask, in TFLOP/s: 390-400 (head dim 64) and 400-490 (128) for
Triton kernels of this kind, 410 and 700 for cuDNN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_attention import PADDED
from benchmarks.shapes import Sequences as Shape
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch.attention.any_length import AttentionTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Queries, keys, warps, stages, most registers, and the expected share of the forward, for head dims of 64 and 128.
# Programs on a multiprocessor and spills, where they are said, are what sm_90's compiler makes of a plain call.
FORWARD_64 = (
    (128, 64, 8, 2, 128, 1.00),
    (128, 64, 8, 3, 128, 0.99),
    (128, 64, 8, 2, None, 1.04),  # 134 registers, one program
    (128, 64, 4, 2, None, 1.03),
    (128, 128, 8, 2, None, 0.98),
    (128, 128, 8, 3, None, 0.99),
    (64, 64, 4, 3, None, 1.03),  # three programs
    (64, 128, 4, 2, None, 1.03),
)
FORWARD_128 = (
    (128, 128, 8, 2, None, 1.00),
    (128, 128, 8, 3, None, 1.01),  # all of the shared memory, 40 bytes spilt
    (128, 64, 8, 2, None, 1.03),
    (128, 64, 8, 3, None, 1.02),
    (64, 64, 4, 2, None, 0.98),  # two programs
    (64, 64, 4, 3, None, 0.98),
    (128, 64, 4, 2, None, 1.04),  # two programs, 64 bytes spilt
)
# The same of a step forward and backward, for the pass over tiles of queries.
QUERIES_128 = (
    (64, 64, 4, 2, None, 1.00),  # two programs
    (64, 64, 4, 3, None, 1.02),
    (64, 32, 4, 3, None, 1.01),
    (64, 128, 8, 2, None, 1.02),
    (128, 64, 8, 2, None, 0.98),
    (128, 64, 8, 3, None, 0.99),
)
# Queries, keys, warps, stages, passes for dk and dv; one pass spills 96 bytes at 32 queries and 8 at 16.
PASSES = ((32, 64, 8, 2, 1, 1.05), (16, 64, 8, 2, 1, 0.97), (16, 64, 8, 2, 2, 1.06), (32, 64, 8, 3, 2, 0.99))


def tiles(
    current: AttentionTiles, arguments: Arguments, queries: int, keys: int, warps: int, stages: int,
    registers: int | None,
) -> Iterator[AttentionTiles]:  # fmt: skip
    yield AttentionTiles(queries, keys, warps, stages, registers, current.passes)


def passes(
    current: AttentionTiles, arguments: Arguments, queries: int, keys: int, warps: int, stages: int, passes: int
) -> Iterator[AttentionTiles]:
    changed = replace(current, block_queries=queries, block_keys=keys, num_warps=warps)
    yield replace(changed, num_stages=stages, passes=passes)


# Sizes whose scores in float64 fit the GPU, and that fill it several times: 1,024 tiles of 128 queries or more.
SIZES_64 = [Shape(2, 4096, 32, 64, "none"), Shape(2, 4096, 32, 64, "causal"), Shape(64, 512, 12, 64, "lengths")]
SIZES_128 = [Shape(2, 4096, 16, 128, "none"), Shape(2, 4096, 16, 128, "causal")]
WIDEST = [Shape(2, 4096, 8, 256, "causal")]
# Longer than the kernels of short attention take.
REHEARSAL, REHEARSED_WIDEST = Shape(1, 129, 1, 128, "causal"), Shape(1, 65, 1, 256, "causal")

SWEEPS = (
    LaunchSweep(
        "attention.any_length.attention_forward", PADDED, FORWARD,
        question="Two programs of 8 warps, held to 128 registers, hold 128 x 64 scores each: do 128 keys at a time or a"
        " third stage hide the softmax better?",
        prediction="128 x 128 gains 2 % at a head dim of 64 without a mask and loses as much where causality wastes its"
        " corners; 390 TFLOP/s without a mask.",
        sizes=SIZES_64, rehearsal=REHEARSAL, table=FORWARD_64, settings=tiles,
    ),
    LaunchSweep(
        "attention.any_length.attention_forward", PADDED, FORWARD,
        question="At a head dim of 128, do two programs of 64 x 64 overlap better than the two warp groups of one?",
        prediction="Within 2 % of each other, 450 TFLOP/s without a mask; a third stage does not fit without spills.",
        sizes=SIZES_128, rehearsal=REHEARSAL, table=FORWARD_128, settings=tiles,
    ),
    LaunchSweep(
        "attention.any_length.attention_backward_queries", PADDED, BOTH,
        question="At a head dim of 128 two programs of 64 queries read k and v twice as often as one of 128: which"
        " counts?",
        prediction="128 queries gain 6 % of the pass, 2 % of the step.",
        sizes=SIZES_128, rehearsal=REHEARSAL, table=QUERIES_128, settings=tiles,
    ),
    LaunchSweep(
        "attention.any_length.attention_backward_keys", PADDED, BOTH,
        question="At a head dim of 256 dk and dv do not fit the registers at 32 x 64: are two passes, 5 products for 4,"
        " cheaper than tiles of 16 queries, or than some words spilt?",
        prediction="16 queries in one pass gain 3 % of the step of some 1.6 ms; 32 queries in one lose 5 %.",
        sizes=WIDEST, rehearsal=REHEARSED_WIDEST, table=PASSES, settings=passes,
    ),
)  # fmt: skip
