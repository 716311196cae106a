"""Token rows with positions, and their gradient: rows of a program, and how wide its columns are.

Forward reads and writes a row a token: on an H200 17 MB and 3.9 µs for 8,192 tokens of 512 columns in bf16, 34 MB and
7.8 µs for 1,024. Each program forms its columns' frequencies anew, in fp64: some 40 instructions a pair of columns, at
64 a cycle and multiprocessor. For 1,024 columns and 2 rows a program that is 320 cycles, 31 times over, so 5.6 µs; for
512 columns and 4 rows 1.4 µs. How much of it hides behind the loads is the question.

The gradient is two launches behind torch's sort of the tokens, 25 µs of small kernels. The vocabulary's 10,000 rows of
512 are 10 MB, 2.4 µs; 32,768 rows of 1,024 are 67 MB, 15.6 µs. How many sorted tokens are added up ahead (CHUNK, 32)
is no launch setting: the share of `embedding_chunks_kernel` in ncu says whether it should be another number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_embedding import SUITE
from benchmarks.shapes import Embedding
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch.rows import RowTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Rows and warps of a program as multiples of today's, and the expected share of today's time.
FORWARD_TILES = ((0.5, 1, 1.20), (1, 0.5, 1.02), (2, 1, 0.92), (2, 2, 0.90), (4, 2, 0.86), (8, 4, 0.86))
# Columns and warps of the kernel over chunks of tokens; rows, columns and warps of that over rows; the share of a step.
BACKWARD_TILES = (
    (128, 8, 8, 512, 4, 1.00),
    (64, 4, 8, 512, 4, 1.00),
    (256, 8, 8, 512, 4, 1.01),
    (128, 8, 4, 512, 4, 0.98),
    (128, 8, 4, 256, 2, 0.98),
    (128, 8, 2, 512, 2, 0.97),
    (128, 8, 1, 512, 1, 1.02),
)


def forward(current: RowTiles, arguments: Arguments, rows: float, warps: float) -> Iterator[RowTiles]:
    block_rows, num_warps = max(1, int(current.block_rows * rows)), int(current.num_warps * warps)
    programs = max(1, -(-arguments["rows"] // block_rows))
    yield replace(current, programs=programs, block_rows=block_rows, num_warps=num_warps)


def backward(
    current: tuple[RowTiles, RowTiles], arguments: Arguments,
    chunk_columns: int, chunk_warps: int, rows: int, columns: int, warps: int,
) -> Iterator[tuple[RowTiles, RowTiles]]:  # fmt: skip
    first, second = current
    chunk_columns, columns = min(chunk_columns, first.block_columns * 2), min(columns, second.block_columns)
    yield (
        replace(first, block_columns=chunk_columns, chunks=-(-arguments["columns"] // chunk_columns),
                num_warps=chunk_warps),
        replace(second, programs=max(1, -(-arguments["rows"] // rows)), block_rows=rows, block_columns=columns,
                chunks=-(-arguments["columns"] // columns), num_warps=warps),
    )  # fmt: skip


SIZES = [Embedding(8192, 512, 10000, 0.1), Embedding(8192, 1024, 32768, 0.1)]
REHEARSAL = Embedding(35, 32, 9, 0.1)

SWEEPS = (
    LaunchSweep(
        "embedding.forward", SUITE, FORWARD,
        question="Do the frequencies in fp64, once a program, hide behind the loads, or are more rows a program due?",
        prediction="Four times the rows in twice the warps gain 10 % of 6 µs at 512 columns, 18 % of 11 µs at 1,024.",
        sizes=SIZES, rehearsal=REHEARSAL, table=FORWARD_TILES, settings=forward,
    ),
    LaunchSweep(
        "embedding.backward", SUITE, BOTH,
        question="All rows of a program wait for its most frequent token, some 60 steps of it: are fewer rows and"
        " smaller programs faster?",
        prediction="The two launches take 12 µs of a step of 45 (10,000 x 512) and 26 of 65 (32,768 x 1024); two rows"
        " in 2 warps gain 3 % of it.",
        sizes=SIZES, rehearsal=REHEARSAL, table=BACKWARD_TILES, settings=backward,
    ),
)  # fmt: skip
