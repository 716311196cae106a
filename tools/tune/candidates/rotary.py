"""Rotary position embedding: how many heads a program turns one after another, and how many tokens at once.

Queries and keys are read and written once: on an H200 34 MB and 7.8 µs for 64 x 128 tokens with 8 heads of 64 in bf16,
268 MB and 62 µs for 4 x 4096 with 16 of 128. To hide 0.8 µs of latency at 4.3 TB/s 3.4 MB must be on their way; a
program of 4 warps has 4 KB, and the first size has 512 of them, 2 MB in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_rotary import SUITE
from benchmarks.shapes import Rotary
from benchmarks.suite import FORWARD
from tfm.kernels.launch.rotary import RotaryTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Tokens as a multiple of today's, heads, warps, and the expected share of today's time.
TILES = (
    (1, 8, 4, 1.00),
    (1, 4, 4, 0.93),
    (1, 2, 4, 0.92),
    (1, 1, 4, 0.96),
    (1, 16, 4, 1.10),
    (0.5, 8, 4, 0.97),
    (0.5, 4, 2, 0.95),
    (2, 4, 8, 0.94),
)


def tiles(current: RotaryTiles, arguments: Arguments, tokens: float, heads: int, warps: int) -> Iterator[RotaryTiles]:
    block_tokens = max(1, int(current.block_tokens * tokens))
    programs = -(-arguments["tokens"] // block_tokens)
    yield replace(current, programs=programs, block_tokens=block_tokens, group=heads, num_warps=warps)


SWEEPS = (
    LaunchSweep(
        "rotary.tiles", SUITE, FORWARD,
        question="Eight heads after one another read the angles once, but leave few programs: are four or two better?",
        prediction="Four gain 7 % at 64 x 128 (9 µs today), where twice the programs fill the memory's latency, and 1 %"
        " at 4 x 4096 (66 µs).",
        sizes=[Rotary(64, 128, 8, 64), Rotary(4, 4096, 16, 128)], rehearsal=Rotary(2, 3, 2, 16),
        table=TILES, settings=tiles,
    ),
)  # fmt: skip
