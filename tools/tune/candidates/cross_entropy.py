"""The loss of a linear layer: logits stored or streamed, how many at once, and how a row of them is covered.

The times that are expected are those of the table in kernels/launch/cross_entropy.py: 2.74 ms both ways at 8192 x 1024
x 32768 in bf16 on an H200, of which the one launch over stored logits takes 0.29, and 0.92 ms streamed without
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_cross_entropy import SUITE
from benchmarks.shapes import Vocabulary
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch import CrossEntropyTiles, RowTiles, StreamingTiles
from tfm.kernels.launch.cross_entropy import TILE_ROWS
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Elements of a block, warps, and the expected share of today's step.
ROW_BLOCKS = (
    (2048, 4, 1.00),
    (4096, 4, 1.01),
    (4096, 8, 1.00),
    (8192, 8, 1.01),
    (8192, 16, 1.00),
    (8192, 32, 1.00),
    (16384, 16, 1.02),
    (16384, 32, 1.01),
)
# Rows, classes and depth of a tile, tiles of a program, warps, stages, share; "stored" instead where it is None.
STREAMED = (
    (None, 1.12),
    (128, 256, 64, 8, 8, 4, 1.00),
    (128, 256, 64, 8, 8, 3, 1.04),
    (128, 256, 64, 4, 8, 4, 1.01),
    (128, 256, 64, 16, 8, 4, 1.03),
    (128, 128, 64, 16, 8, 4, 1.10),
    (128, 128, 64, 16, 8, 3, 1.03),  # two programs
    (64, 256, 64, 8, 4, 4, 1.20),
)
# Where "stored" is today's.
WIDE_STREAMED = ((128, 256, 64, 8, 8, 4, 1.02), (128, 256, 64, 8, 8, 3, 1.05))
# Rows held at once as multiples of today's, and the share.
CHUNKS = ((0.5, 1.06), (2, 0.97), (4, 0.96))
# Rows and warps as multiples of today's, of the kernel behind the streamed logits.
ENDS = ((0.5, 1, 1.00), (2, 1, 1.00), (0.5, 0.5, 0.99), (0.25, 0.25, 0.99))
# Losses of a block, warps.
MEANS = ((1024, 4, 1.01), (2048, 16, 1.00), (4096, 32, 1.00), (8192, 32, 0.99))


def row_blocks(current: CrossEntropyTiles, arguments: Arguments, block: int, warps: int) -> Iterator[CrossEntropyTiles]:
    yield CrossEntropyTiles(block, -(-arguments["classes"] // block), warps)


def streamed(
    current: StreamingTiles | None, arguments: Arguments,
    rows: int, classes: int, depth: int, tiles: int, warps: int, stages: int,
) -> Iterator[StreamingTiles]:  # fmt: skip
    yield StreamingTiles(rows, classes, depth, tiles, warps, stages)


def chunks(current: int, arguments: Arguments, rows: float) -> Iterator[int]:
    # Whole tiles, where there is more than one.
    tile = TILE_ROWS if current > TILE_ROWS else 1
    yield min(-(-int(current * rows) // tile) * tile, arguments["rows"])


def ends(current: RowTiles, arguments: Arguments, rows: float, warps: float) -> Iterator[RowTiles]:
    block_rows, num_warps = int(current.block_rows * rows), int(current.num_warps * warps)
    programs = -(-arguments["rows"] // block_rows)
    yield replace(current, programs=programs, block_rows=block_rows, num_warps=num_warps)


def means(current: CrossEntropyTiles, arguments: Arguments, block: int, warps: int) -> Iterator[CrossEntropyTiles]:
    yield CrossEntropyTiles(block, -(-arguments["rows"] // block), warps)


SIZES = [Vocabulary(8192, 512, 32768, 0.1), Vocabulary(8192, 1024, 32768, 0.1), Vocabulary(8192, 512, 10000, 0.1)]
# Wider than what is streamed today.
WIDER = [Vocabulary(8192, 2048, 32768, 0.1)]
REHEARSAL = Vocabulary(6, 32, 50, 0.1)

SWEEPS = (
    LaunchSweep(
        "streaming_cross_entropy", SUITE, FORWARD,
        question="Does a Triton matmul that folds its logits as it makes them beat cuBLAS and a pass over stored ones?",
        prediction="0.53 against 0.63 ms at D = 512 (520 TFLOP/s), 0.92 against 0.99 ms at 1,024 (600 TFLOP/s); 128"
        " classes a tile lose 10 %, but 3 % as two programs a multiprocessor.",
        sizes=SIZES, rehearsal=REHEARSAL, table=STREAMED, settings=streamed,
    ),
    LaunchSweep(
        "streaming_cross_entropy", SUITE, FORWARD,
        question="Is streaming worth it beyond a width of 1,024, where the logits' traffic is ever less of the whole?",
        prediction="1.76 ms at 2,048 (625 TFLOP/s) against 1.72 stored.",
        sizes=WIDER, rehearsal=REHEARSAL, table=WIDE_STREAMED, settings=streamed,
    ),
    LaunchSweep(
        "streaming_losses", SUITE, FORWARD,
        question="A row's 16 shares come one after another: do more and smaller programs hide their latency?",
        prediction="12 µs of 530 at 32k classes, 6 of 170 at 10k; half the rows in half the warps gain 1 % there.",
        sizes=[SIZES[0], SIZES[2]], rehearsal=REHEARSAL, table=ENDS, settings=ends,
    ),
    LaunchSweep(
        "logits_rows", SUITE, BOTH,
        question="Each chunk reads and writes the fp32 sums of dW: what do fewer and larger chunks gain?",
        prediction="Twice the rows 3 % of 1.59 ms at D = 512 and 2 % of 2.74 ms at 1,024, four times 1 % more.",
        sizes=SIZES, rehearsal=REHEARSAL, table=CHUNKS, settings=chunks,
    ),
    LaunchSweep(
        "cross_entropy", SUITE, BOTH,
        question="Is a row's second read served by the L2 cache at 16 warps and two programs a multiprocessor?",
        prediction="The launch moves 3.7 TB/s, 0.29 ms of either step; other blocks differ by at most a tenth of that,"
        " 2 % of the step, and 8 warps with 32 elements a thread lose it.",
        sizes=SIZES, rehearsal=REHEARSAL, table=ROW_BLOCKS, settings=row_blocks,
    ),
    LaunchSweep(
        "mean_loss", SUITE, FORWARD,
        question="One program sums all losses: is it waited for?",
        prediction="3 µs of 170 at 10k classes, half of it the launch; one block of 32 warps saves 1 µs of them.",
        sizes=[SIZES[2]], rehearsal=REHEARSAL, table=MEANS, settings=means,
    ),
)  # fmt: skip
