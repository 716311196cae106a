"""The loss of a linear layer: logits stored or streamed, and how many at once.

The times that are expected are those of the table in kernels/launch/cross_entropy.py: 2.74 ms both ways at 8192 x 1024
x 32768 in bf16 on an H200, of which the one launch over stored logits takes 0.29, and 0.92 ms streamed without
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bench_cross_entropy import SUITE
from benchmarks.shapes import Vocabulary
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch.cross_entropy import TILE_ROWS, StreamingTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Rows, classes and depth of a tile, tiles of a program, warps, stages, share; "stored" instead where it is None.
STREAMED = (
    (None, 1.12),
    (128, 256, 64, 8, 8, 4, 1.00),
    (128, 256, 64, 4, 8, 4, 1.01),
    (128, 256, 64, 16, 8, 4, 1.03),
    (128, 128, 64, 16, 8, 3, 1.03),  # two programs
)
# Rows held at once as multiples of today's, and the share.
CHUNKS = ((0.5, 1.06), (2, 0.97), (4, 0.96))


def streamed(
    current: StreamingTiles | None, arguments: Arguments,
    rows: int, classes: int, depth: int, tiles: int, warps: int, stages: int,
) -> Iterator[StreamingTiles]:  # fmt: skip
    yield StreamingTiles(rows, classes, depth, tiles, warps, stages)


def chunks(current: int, arguments: Arguments, rows: float) -> Iterator[int]:
    # Whole tiles, where there is more than one.
    tile = TILE_ROWS if current > TILE_ROWS else 1
    yield min(-(-int(current * rows) // tile) * tile, arguments["rows"])


SIZES = [Vocabulary(8192, 512, 32768, 0.1), Vocabulary(8192, 1024, 32768, 0.1), Vocabulary(8192, 512, 10000, 0.1)]
REHEARSAL = Vocabulary(6, 32, 50, 0.1)

SWEEPS = (
    LaunchSweep(
        "cross_entropy.streaming_cross_entropy", SUITE, FORWARD,
        question="Does a Triton matmul that folds its logits as it makes them beat cuBLAS and a pass over stored ones?",
        prediction="0.53 against 0.63 ms at D = 512 (520 TFLOP/s), 0.92 against 0.99 ms at 1,024 (600 TFLOP/s); 128"
        " classes a tile, as two programs a multiprocessor, lose 3 %.",
        sizes=SIZES, rehearsal=REHEARSAL, table=STREAMED, settings=streamed,
    ),
    LaunchSweep(
        "cross_entropy.logits_rows", SUITE, BOTH,
        question="Each chunk reads and writes the fp32 sums of dW: what do fewer and larger chunks gain?",
        prediction="Twice the rows 3 % of 1.59 ms at D = 512 and 2 % of 2.74 ms at 1,024, four times 1 % more.",
        sizes=SIZES, rehearsal=REHEARSAL, table=CHUNKS, settings=chunks,
    ),
)  # fmt: skip
