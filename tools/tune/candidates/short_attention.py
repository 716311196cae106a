"""Attention over at most a few hundred keys: how much of a head a program takes, and from which length on tiles win.

A batch of 256 sentences of 14 tokens is 15 MB in bf16 forward (3.4 µs of an H200's memory) and 2,048 pairs of sentence
and head, 16 for each multiprocessor: what counts is the latency of a program and how many are resident.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_attention import PACKED, PADDED
from benchmarks.shapes import Sentences
from benchmarks.shapes import Sequences as Shape
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch import ShortBackwardTiles, ShortForwardTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Queries, warps, whether a program takes all queries of a head, and the expected share; keys are one tile. None: the
# kernels for any length.
SENTENCE_FORWARD = (
    (None, 1.40),
    (16, 1, True, 1.00),
    (16, 2, True, 1.05),
    (16, 1, False, 1.02),
    (32, 1, True, 1.00),
    (32, 2, True, 0.98),
    (64, 4, True, 1.08),
)
LONGER_FORWARD = (
    (None, 1.05),
    (64, 4, False, 1.00),
    (64, 8, False, 1.01),
    (32, 4, False, 1.05),
    (32, 2, False, 1.03),
    (128, 8, False, 1.00),
    (64, 4, True, 1.06),
)
# Queries, warps, passes, and the expected share.
SENTENCE_BACKWARD = (
    (None, 1.40),
    (16, 1, 1, 1.05),
    (16, 2, 1, 1.00),
    (16, 4, 1, 1.00),
    (16, 8, 1, 1.06),
    (32, 2, 1, 1.02),
    (32, 4, 1, 0.98),
)
LONGER_BACKWARD = (
    (None, 1.05),
    (16, 8, 1, 1.03),
    (16, 8, 2, 1.00),
    (32, 4, 1, 1.04),
    (32, 8, 1, 1.00),
    (32, 8, 2, 1.06),
    (64, 8, 1, 1.03),
    (64, 8, 2, 1.04),
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
LONGER = [Shape(256, 128, 12, 64, "lengths"), Shape(128, 256, 12, 64, "lengths")]
REHEARSAL = {"sentences": Sentences(2, 1, 16, "cross"), "longer": Shape(1, 70, 1, 16, "lengths")}

SWEEPS = (
    LaunchSweep(
        "short_attention_forward", PACKED, FORWARD,
        question="Half to all of a multiprocessor's pairs are resident with one warp each: are 2 warps or 32 queries"
        " faster?",
        prediction="Today's take 5 µs for 256 sentences of 8 heads; 32 queries in 2 warps are within 2 %, the kernels"
        " for any length take 1.4 times as long.",
        sizes=SENTENCES, rehearsal=REHEARSAL["sentences"], table=SENTENCE_FORWARD, settings=forward,
    ),
    LaunchSweep(
        "short_attention_backward", PACKED, BOTH,
        question="A head's backward takes 2 to 4 warps for its sums' registers: do they wait for one another?",
        prediction="The step takes 17 µs for 256 sentences of 8 heads; 2 and 4 warps are within 2 %.",
        sizes=SENTENCES, rehearsal=REHEARSAL["sentences"], table=SENTENCE_BACKWARD, settings=backward,
    ),
    LaunchSweep(
        "short_attention_forward", PADDED, FORWARD,
        question="At 128 and 256 keys the scores of a tile of queries fill the registers: are fewer queries faster?",
        prediction="180 TFLOP/s at 128 keys; the kernels for any length take 1.05 times as long, and less at 256.",
        sizes=LONGER, rehearsal=REHEARSAL["longer"], table=LONGER_FORWARD, settings=forward,
    ),
    LaunchSweep(
        "short_attention_backward", PADDED, BOTH,
        question="Does a second pass for dv, with registers of its own, pay for forming the weights twice?",
        prediction="At 256 keys one pass spills and two are right; at 128 keys two lose 6 %. The kernels for any length"
        " take 1.05 times as long at 128 and win at 256.",
        sizes=LONGER, rehearsal=REHEARSAL["longer"], table=LONGER_BACKWARD, settings=backward,
    ),
)  # fmt: skip
