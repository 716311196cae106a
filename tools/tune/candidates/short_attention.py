"""Attention over the few keys of a sentence: how much of a head a program takes.

A batch of 256 sentences of 14 tokens is 15 MB in bf16 forward (3.4 µs of an H200's memory) and 2,048 pairs of sentence
and head, 16 for each multiprocessor: what counts is the latency of a program and how many are resident.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_attention import PACKED
from benchmarks.shapes import Sentences
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch.attention.short import ShortBackwardTiles, ShortForwardTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Queries, warps, whether a program takes all queries of a head, and the expected share; keys are one tile. None: the
# kernels for any length.
FORWARD_TILES = (
    (None, 1.40),
    (16, 1, True, 1.00),
    (16, 1, False, 1.02),
    (32, 1, True, 1.00),
    (32, 2, True, 0.98),
)
# Queries, warps, passes, and the expected share.
BACKWARD_TILES = (
    (None, 1.40),
    (16, 2, 1, 1.00),
    (16, 4, 1, 1.00),
    (32, 2, 1, 1.02),
    (32, 4, 1, 0.98),
)


def forward(
    current: ShortForwardTiles, arguments: Arguments, queries: int, warps: int, takes_all: bool
) -> Iterator[ShortForwardTiles]:
    yield replace(current, block_queries=queries, num_warps=warps, takes_all=takes_all)


def backward(
    current: ShortBackwardTiles, arguments: Arguments, queries: int, warps: int, passes: int
) -> Iterator[ShortBackwardTiles]:
    yield replace(current, block_queries=queries, num_warps=warps, passes=passes)


SENTENCES = [Sentences(256, 8, 64), Sentences(256, 8, 64, "causal"), Sentences(512, 16, 64, longest=64)]
REHEARSAL = Sentences(2, 1, 16, "cross")

SWEEPS = (
    LaunchSweep(
        "attention.short.short_attention_forward", PACKED, FORWARD,
        question="Half to all of a multiprocessor's pairs are resident with one warp each: are 2 warps or 32 queries"
        " faster?",
        prediction="Today's take 5 µs for 256 sentences of 8 heads; 32 queries in 2 warps are within 2 %, the kernels"
        " for any length take 1.4 times as long.",
        sizes=SENTENCES, rehearsal=REHEARSAL, table=FORWARD_TILES, settings=forward,
    ),
    LaunchSweep(
        "attention.short.short_attention_backward", PACKED, BOTH,
        question="A head's backward takes 2 to 4 warps for its sums' registers: do they wait for one another?",
        prediction="The step takes 17 µs for 256 sentences of 8 heads; 2 and 4 warps are within 2 %.",
        sizes=SENTENCES, rehearsal=REHEARSAL, table=BACKWARD_TILES, settings=backward,
    ),
)  # fmt: skip
