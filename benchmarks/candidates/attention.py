"""Attention of any length: tiles of queries and keys, and how many loads of the next ones are on their way.

A product of tensor cores waits for the exponentials of the one before it, unless another program's or warp group's
products fill the gap. Published for an H100 without a mask, in TFLOP/s: 390-400 (head dim 64) and 400-490 (128) for
Triton kernels of this kind, 410 and 700 for cuDNN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.bench_attention import SUITE
from benchmarks.candidates.sweep import Candidate, Sweep
from benchmarks.shapes import Sequences as Shape
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch import AttentionTiles

# Queries, keys, warps, stages, and the expected share of the forward.
FORWARD_TILES = (
    (128, 64, 8, 2, 1.00),
    (128, 64, 8, 3, 0.97),
    (128, 64, 4, 2, 1.03),
    (128, 64, 4, 3, 1.00),
    (128, 128, 8, 2, 0.95),
    (128, 128, 8, 3, 0.96),
    (128, 32, 4, 3, 1.10),
    (64, 64, 4, 3, 1.05),
    (64, 128, 4, 2, 1.03),
    (64, 128, 4, 3, 1.04),
)
# The same of a step forward and backward, for the pass over tiles of queries and for that over tiles of keys.
QUERY_TILES = (
    (128, 64, 8, 2, 1.00),
    (128, 64, 8, 3, 0.99),
    (128, 32, 8, 3, 1.03),
    (128, 128, 8, 2, 1.02),
    (64, 64, 4, 2, 1.01),
    (64, 64, 4, 3, 1.00),
    (64, 128, 4, 2, 1.02),
    (64, 128, 8, 2, 1.02),
)
KEY_TILES = (
    (64, 128, 8, 2, 1.00),
    (64, 128, 8, 3, 0.99),
    (32, 128, 8, 3, 1.04),
    (128, 128, 8, 2, 1.03),
    (64, 64, 4, 2, 1.00),
    (64, 64, 4, 3, 0.99),
    (128, 64, 4, 2, 1.03),
    (128, 64, 8, 2, 1.02),
)


def among(tiles: Sequence[tuple[Any, ...]]) -> Any:
    def candidates(current: AttentionTiles, arguments: dict[str, Any]) -> Iterator[Candidate]:
        for queries, keys, warps, stages, expected in tiles:
            changed = replace(current, block_queries=queries, block_keys=keys, num_warps=warps, num_stages=stages)
            yield Candidate(changed, expected)

    return candidates


# Sizes whose scores in float64 fit the GPU, and that fill it several times: 1,024 tiles of 128 queries or more.
SIZES = [
    Shape(2, 4096, 32, 64, "none"),
    Shape(2, 4096, 32, 64, "causal"),
    Shape(2, 4096, 16, 128, "causal"),
    Shape(64, 512, 12, 64, "lengths"),
]
# Longer than the kernels of short attention take.
REHEARSAL = Shape(1, 257, 1, 16, "causal")

SWEEPS = (
    Sweep(
        "attention_forward", SUITE, FORWARD,
        question="One program of 8 warps holds 128 x 64 scores: do 128 keys at a time or a third stage hide the softmax"
        " better?",
        prediction="128 x 128 gains 5 % without a mask and loses as much where causality wastes its corners; 390"
        " TFLOP/s at a head dim of 64 and 450 at 128 without a mask.",
        sizes=SIZES, rehearsal=REHEARSAL, candidates=among(FORWARD_TILES),
    ),
    Sweep(
        "attention_backward_queries", SUITE, BOTH,
        question="Three products of a tile, k and v read for each: is the loads' latency or the registers the limit?",
        prediction="The pass is a third of the step, 380 TFLOP/s at a head dim of 64; no candidate changes the step by"
        " more than 3 %.",
        sizes=SIZES, rehearsal=REHEARSAL, candidates=among(QUERY_TILES),
    ),
    Sweep(
        "attention_backward_keys", SUITE, BOTH,
        question="Four products of a tile and two sums of them: do 64 keys in 4 warps, so twice the programs, hide it?",
        prediction="The pass is 45 % of the step, 350 TFLOP/s at a head dim of 64; 64 keys are within 2 % of 128.",
        sizes=SIZES, rehearsal=REHEARSAL, candidates=among(KEY_TILES),
    ),
)  # fmt: skip
