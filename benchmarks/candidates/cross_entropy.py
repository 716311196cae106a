"""The loss of a linear layer: logits stored or streamed, how many at once, and how a row of them is covered.

The times that are expected are those of the table in kernels/launch/cross_entropy.py: 2.74 ms both ways at 8192 x 1024
x 32768 in bf16 on an H200, of which the one launch over stored logits takes 0.29, and 0.92 ms streamed without
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.bench_linear_cross_entropy import SUITE
from benchmarks.candidates.sweep import Candidate, Sweep
from benchmarks.shapes import Vocabulary
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch import CrossEntropyTiles, StreamingTiles
from tfm.kernels.launch.cross_entropy import TILE_ROWS

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
    (StreamingTiles(128, 256, 64, 8, 8, 4), 1.00),
    (StreamingTiles(128, 256, 64, 8, 8, 3), 1.04),
    (StreamingTiles(128, 256, 64, 4, 8, 4), 1.01),
    (StreamingTiles(128, 256, 64, 16, 8, 4), 1.03),
    (StreamingTiles(128, 128, 64, 16, 8, 4), 1.10),
    (StreamingTiles(128, 128, 64, 16, 4, 4), 1.15),
    (StreamingTiles(64, 256, 64, 8, 4, 4), 1.20),
)
# Rows held at once as multiples of today's, and the share.
CHUNKS = ((0.5, 1.06), (2, 0.97), (4, 0.96))


def row_blocks(current: CrossEntropyTiles, arguments: dict[str, Any]) -> Iterator[Candidate]:
    for block, num_warps, expected in ROW_BLOCKS:
        yield Candidate(CrossEntropyTiles(block, -(-arguments["classes"] // block), num_warps), expected)


def streamed(current: StreamingTiles | None, arguments: dict[str, Any]) -> Iterator[Candidate]:
    for tiles, expected in STREAMED:
        yield Candidate(tiles, expected)


def chunks(current: int, arguments: dict[str, Any]) -> Iterator[Candidate]:
    for factor, expected in CHUNKS:
        rows = -(-int(current * factor) // TILE_ROWS) * TILE_ROWS
        yield Candidate(min(rows, arguments["rows"]), expected)


SIZES = [Vocabulary(8192, 512, 32768, 0.1), Vocabulary(8192, 1024, 32768, 0.1), Vocabulary(8192, 512, 10000, 0.1)]
REHEARSAL = Vocabulary(6, 32, 50, 0.1)

SWEEPS = (
    Sweep(
        "streaming_cross_entropy", SUITE, FORWARD,
        question="Does a Triton matmul that folds its logits as it makes them beat cuBLAS and a pass over stored ones?",
        prediction="0.53 against 0.63 ms at D = 512 (520 TFLOP/s), 0.92 against 0.99 ms at 1,024 (600 TFLOP/s); 128"
        " classes a tile lose 10 %.",
        sizes=SIZES, rehearsal=REHEARSAL, candidates=streamed,
    ),
    Sweep(
        "logits_rows", SUITE, BOTH,
        question="Each chunk reads and writes the fp32 sums of dW: what do fewer and larger chunks gain?",
        prediction="Twice the rows 3 % of 1.59 ms at D = 512 and 2 % of 2.74 ms at 1,024, four times 1 % more.",
        sizes=SIZES, rehearsal=REHEARSAL, candidates=chunks,
    ),
    Sweep(
        "cross_entropy", SUITE, BOTH,
        question="Is a row's second read served by the L2 cache at 16 warps and two programs a multiprocessor?",
        prediction="The launch moves 3.7 TB/s, 0.29 ms of either step; other blocks differ by at most a tenth of that,"
        " 2 % of the step, and 8 warps with 32 elements a thread lose it.",
        sizes=SIZES, rehearsal=REHEARSAL, candidates=row_blocks,
    ),
)  # fmt: skip
