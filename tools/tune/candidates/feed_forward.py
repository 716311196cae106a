"""The feed-forward network's first matmul: an epilogue in Triton, and its tiles, or a pass beside cuBLAS.

The times that are expected follow kernels/launch/feed_forward.py: products at 505 TFLOP/s with an epilogue and at 770
by cuBLAS on an H200, whose pass moves 4 bytes an element of the hidden layer forward and 6 backward at 4.3 TB/s. So the
first matmul takes 34 µs at 8192 x 512 x 2048 against 22 + 16, and 136 µs at 8192 x 1024 x 4096 against 89 + 31; the
second is cuBLAS's in any case, 22 and 89 µs. Whichever wins at a depth moves DEEPEST there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench_feed_forward import GATED, PLAIN
from benchmarks.shapes import FeedForward
from benchmarks.suite import FORWARD
from tfm.kernels.launch.feed_forward import MatmulTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Rows, columns and depth of a tile, slices of 16 or 32 columns, warps, stages, most registers, and the expected share.
MATMUL_TILES = (
    (128, 128, 64, 4, 8, 3, 128, 1.00),
    (128, 128, 64, 8, 8, 3, 128, 1.00),
    (128, 128, 64, 2, 8, 3, None, 1.02),
    (128, 256, 64, 8, 8, 3, None, 1.02),
    (128, 256, 64, 16, 8, 4, None, 1.01),
    (256, 128, 64, 8, 8, 3, None, 1.03),
)


def epilogues(
    current: MatmulTiles | None, arguments: Arguments,
    rows: int, columns: int, depth: int, slices: int, warps: int, stages: int, registers: int | None,
) -> Iterator[MatmulTiles]:  # fmt: skip
    all_columns = arguments["columns"] * (2 if arguments.get("gated") else 1)
    programs = -(-arguments["rows"] // rows) * -(-all_columns // columns)
    yield MatmulTiles(programs, rows, columns, depth, slices, warps, stages, registers)


def beside_cublas(share: float) -> tuple[tuple[Any, ...], ...]:
    """Returns the tiles, and None: cuBLAS and an element-wise kernel, expected to take this share."""
    return ((None, share), *MATMUL_TILES)


SHALLOW, WIDE = [FeedForward(8192, 512, 2048, 0.1)], [FeedForward(8192, 1024, 4096, 0.1)]
GATED_WIDE = [FeedForward(8192, 1024, 2816)]
REHEARSAL = FeedForward(6, 32, 48, 0.1)

SWEEPS = (
    LaunchSweep(
        "feed_forward.linear_activation", PLAIN, FORWARD,
        question="At a depth of 512, does the epilogue save more than Triton's slower product costs, and do two"
        " programs of 128 x 128 a multiprocessor beat one of 128 x 256?",
        prediction="cuBLAS with a pass takes 1.07 times the step (60 against 56 µs); 128 x 256 is within 2 %.",
        sizes=SHALLOW, rehearsal=REHEARSAL, table=beside_cublas(1.07), settings=epilogues,
    ),
    LaunchSweep(
        "feed_forward.linear_activation", PLAIN, FORWARD,
        question="At a depth of 1,024, the deepest that takes the epilogue today, does cuBLAS with a pass win?",
        prediction="cuBLAS with a pass takes 0.93 times the step (209 against 225 µs): for ReLU the limit is 700.",
        sizes=WIDE, rehearsal=REHEARSAL, table=beside_cublas(0.93), settings=epilogues,
    ),
    LaunchSweep(
        "feed_forward.linear_activation", GATED, FORWARD,
        question="Where gate and up are multiplied at once, does the epilogue pay at a depth of 1,024?",
        prediction="cuBLAS with a pass takes 0.87 times the step: 123 + 32 against 187 µs, and 61 for the second.",
        sizes=GATED_WIDE, rehearsal=REHEARSAL, table=beside_cublas(0.87), settings=epilogues,
    ),
)  # fmt: skip
