"""LayerNorm behind dropout and residual: elements a thread, and programs on a multiprocessor.

The kernels move each tensor once, so that all questions are about how many loads are in flight. On an H200 (4.3 TB/s)
the least times are 15.6 µs forward and 35 µs both ways at 8192 x 1024 in bf16, and eight times that at 16384 x 4096.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_norm import LAYER
from benchmarks.shapes import Norm
from benchmarks.suite import BOTH, FORWARD
from tfm.kernels.launch.rows import RowTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Rows and warps of a program as multiples of today's, and the expected share of today's time.
FORWARD_TILES = (
    (0.5, 1, 1.02),
    (1, 0.5, 1.02),
    (1, 2, 1.03),
    (2, 1, 1.01),
    (2, 2, 0.99),
    (0.5, 0.5, 1.00),
    (4, 2, 1.03),
)
# The same with programs a multiprocessor, and tiles on their way to each as a difference to today's.
BACKWARD_TILES = (
    (1, 1, 1, 0, 1.15),
    (1, 1, 1, 2, 1.05),
    (1, 1, 2, -1, 1.03),
    (1, 1, 2, 1, 1.00),
    (1, 1, 3, 0, 1.00),
    (1, 1, 4, -1, 1.02),
    (0.5, 1, 2, 1, 1.03),
    (0.5, 0.5, 4, 0, 0.98),
    (1, 0.5, 4, 0, 1.05),
    (2, 2, 1, 0, 1.03),
    (2, 1, 2, 0, 1.10),
)
# Programs and columns of a tile of the partial sums, warps, share. It is 2-4 µs of the whole.
SUM_TILES = ((64, 32, 4, 1.00), (128, 32, 4, 1.00), (256, 32, 8, 1.01), (128, 16, 8, 0.99), (64, 16, 4, 0.98))


def forward(current: RowTiles, arguments: Arguments, rows: float, warps: float) -> Iterator[RowTiles]:
    yield from _scaled(current, rows, warps, arguments["rows"])


def backward(
    current: RowTiles, arguments: Arguments, rows: float, warps: float, resident: int, stages: int
) -> Iterator[RowTiles]:
    if current.stages + stages > 0:
        changed = replace(current, stages=current.stages + stages)
        yield from _scaled(changed, rows, warps, arguments["rows"], resident * arguments["multiprocessors"])


def _scaled(
    current: RowTiles, rows: float, warps: float, all_rows: int, most_programs: int | None = None
) -> Iterator[RowTiles]:
    """Nothing where a row of several chunks would get company, or the warps leave 1 to 32."""
    block_rows, num_warps = int(current.block_rows * rows), int(current.num_warps * warps)
    if block_rows < 1 or (current.chunks > 1 and block_rows > 1) or not 1 <= num_warps <= 32:
        return
    tiles = max(1, -(-all_rows // block_rows))
    programs = tiles if most_programs is None else min(tiles, most_programs)
    yield replace(current, programs=programs, block_rows=block_rows, num_warps=num_warps)


def sums(current: RowTiles, arguments: Arguments, rows: int, columns: int, warps: int) -> Iterator[RowTiles]:
    yield RowTiles(-(-arguments["columns"] // columns), rows, columns, current.chunks, warps)


SIZES = [Norm(4096, 512, 0.1), Norm(8192, 1024, 0.1), Norm(16384, 4096), Norm(8192, 8192)]
REHEARSAL = Norm(6, 32, 0.1)

SWEEPS = (
    LaunchSweep(
        "norm.forward", LAYER, FORWARD,
        question="Are 16 elements a thread in 4 warps enough loads in flight, or do larger programs read faster?",
        prediction="Today's reach 92 % of the copy's bandwidth from 8192 x 1024 on (17 µs there); twice the rows in"
        " twice the warps gain at most 1 %, and half the rows lose 2 %. At 4096 x 512 all are within 5 % of 5 µs.",
        sizes=SIZES, rehearsal=REHEARSAL, table=FORWARD_TILES, settings=forward,
    ),
    LaunchSweep(
        "norm.backward", LAYER, BOTH,
        question="Two programs of 8 warps are 16 of a multiprocessor's 64 warps: do more and smaller ones hide more, or"
        " do the tiles on their way do so?",
        prediction="Four programs of 4 warps and half the rows gain 2 % of the step, one program loses 15 %; the"
        " backward alone reaches 80 % of the copy's bandwidth (24 µs at 8192 x 1024).",
        sizes=SIZES, rehearsal=REHEARSAL, table=BACKWARD_TILES, settings=backward,
    ),
    LaunchSweep(
        "rows.sum_partials", LAYER, BOTH,
        question="264 programs' sums are three rounds of 128: do narrower tiles, so more programs, end sooner?",
        prediction="It takes 2.5 µs at 1,024 columns, so that twice the programs gain 0.5 µs: 1-2 % of the step there,"
        " nothing measurable at 4,096.",
        sizes=SIZES[:2], rehearsal=REHEARSAL, table=SUM_TILES, settings=sums,
    ),
)  # fmt: skip
