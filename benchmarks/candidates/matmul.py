"""The feed-forward network's first matmul: an epilogue in Triton or a pass beside cuBLAS, and the tiles of either.

The times that are expected follow kernels/launch/matmul.py: 640 TFLOP/s with an epilogue and 770 without on an H200,
and 4 bytes an element of the hidden layer saved at 4.3 TB/s. So the first matmul takes 27 µs at 8192 x 512 x 2048
against 22 + 16, and 107 µs at 8192 x 1024 x 4096 against 89 + 31; the second is cuBLAS's in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.bench_feed_forward import GATED, PLAIN
from benchmarks.candidates.sweep import Candidate, Sweep
from benchmarks.shapes import FeedForward
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch import ElementTiles, MatmulTiles

# Rows, columns and depth of a tile, slices of 16 or 32 columns, warps, stages, most registers, and the expected share.
MATMUL_TILES = (
    (128, 128, 64, 4, 8, 3, 128, 1.00),
    (128, 128, 64, 8, 8, 3, 128, 1.00),
    (128, 128, 64, 2, 8, 3, None, 1.02),
    (128, 128, 64, 4, 8, 4, None, 1.05),
    (128, 128, 32, 4, 8, 5, 128, 1.06),
    (128, 128, 64, 8, 4, 3, None, 1.04),
    (128, 256, 64, 8, 8, 3, None, 1.02),
    (128, 256, 64, 16, 8, 4, None, 1.01),
    (256, 128, 64, 8, 8, 3, None, 1.03),
    (64, 128, 64, 4, 4, 4, None, 1.08),
    (64, 256, 64, 8, 4, 3, None, 1.05),
)
# Elements of a tile in 4 warps' share, tiles of a program as multiples of today's, and the expected share.
ELEMENT_TILES = ((1024, 1, 1.00), (4096, 1, 1.00), (2048, 2, 1.00), (2048, 0.5, 1.00), (4096, 0.5, 1.00))


def epilogues(current: MatmulTiles | None, arguments: dict[str, Any]) -> Iterator[Candidate]:
    """cuBLAS and an element-wise kernel first: None."""
    yield Candidate(None, 1.10)
    columns = arguments["columns"] * (2 if arguments.get("gated") else 1)
    for block_rows, block_columns, *others, expected in MATMUL_TILES:
        programs = -(-arguments["rows"] // block_rows) * -(-columns // block_columns)
        yield Candidate(MatmulTiles(programs, block_rows, block_columns, *others), expected)


def elements(current: ElementTiles, arguments: dict[str, Any]) -> Iterator[Candidate]:
    rows, columns = arguments["rows"], arguments["columns"]
    for size, factor, expected in ELEMENT_TILES:
        block_rows, tiles = max(1, size // current.block_columns), max(1, int(current.tiles * factor))
        programs = -(-rows // (block_rows * tiles)) * -(-columns // current.block_columns)
        changed = replace(current, programs=programs, block_rows=block_rows, tiles=tiles, num_warps=max(1, size // 512))
        yield Candidate(changed, expected)


SIZES = [FeedForward(8192, 512, 2048, 0.1), FeedForward(8192, 1024, 4096, 0.1)]
GATED_SIZES = [FeedForward(8192, 512, 1408, 0.1), FeedForward(8192, 1024, 2816)]
# Deeper than the epilogue pays for.
DEEP = [FeedForward(8192, 2048, 8192, 0.1)]
# The second has rows of no multiple of 16, which an epilogue does not take.
REHEARSAL, ODD = FeedForward(6, 32, 48, 0.1), FeedForward(6, 33, 48, 0.1)

SWEEPS = (
    Sweep(
        "linear_activation", PLAIN, FORWARD,
        question="Does the epilogue save more than Triton's slower product costs, and do two programs of 128 x 128 a"
        " multiprocessor beat one of 128 x 256?",
        prediction="cuBLAS with a pass takes 1.22 times the step at a depth of 512 (60 against 49 µs) and 1.07 times at"
        " 1,024 (209 against 196 µs); 128 x 256 is within 2 % of 128 x 128.",
        sizes=SIZES, rehearsal=REHEARSAL, candidates=epilogues,
    ),
    Sweep(
        "linear_activation", GATED, FORWARD,
        question="The same where gate and up are multiplied at once, and the pre-activation is twice as wide.",
        prediction="cuBLAS with a pass takes 1.2 times the step at a depth of 512, 1.08 times at 1,024.",
        sizes=GATED_SIZES, rehearsal=REHEARSAL, candidates=epilogues,
    ),
    Sweep(
        "linear_activation_backward", PLAIN, BOTH,
        question="Does the backward's epilogue, which stores two matrices and a sum, still hide behind the products?",
        prediction="cuBLAS with a pass takes 1.08 times the step at a depth of 512, 1.03 times at 1,024; slices of 16"
        " columns are needed for two programs a multiprocessor.",
        sizes=SIZES, rehearsal=REHEARSAL, candidates=epilogues,
    ),
    Sweep(
        "activation_dropout", PLAIN, FORWARD,
        question="Are 16 elements a thread enough loads in flight beside dropout's integers?",
        prediction="The pass takes 68 µs of 780 (92 % of the copy's bandwidth); no candidate changes the step by 1 %.",
        sizes=DEEP, rehearsal=ODD, candidates=elements,
    ),
    Sweep(
        "activation_dropout_backward", PLAIN, BOTH,
        question="Does a program of 16 tiles, one below the other, leave enough programs to fill the chip evenly?",
        prediction="The pass takes 150 µs of 2,400; half as many tiles gain nothing and double the partial sums.",
        sizes=DEEP, rehearsal=ODD, candidates=elements,
    ),
)  # fmt: skip
