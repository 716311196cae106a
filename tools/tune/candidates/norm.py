"""The norms' backward behind dropout and residual: programs on a multiprocessor, and what hides their loads.

The kernels move each tensor once. On an H200 (4.3 TB/s) the least times are 15.6 µs forward and 35 µs both ways at
8192 x 1024 in bf16, and eight times that at 16384 x 4096. RMSNorm has the same tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.bench_norm import LAYER
from benchmarks.shapes import Norm
from benchmarks.suite import BOTH
from tfm.kernels.launch.rows import RowTiles
from tools.tune.candidates.sweep import Arguments, LaunchSweep

# Rows and warps of a program as multiples of today's, programs a multiprocessor, tiles on their way to each as a
# difference to today's, and the expected share of today's time.
TILES = (
    (1, 1, 2, -1, 1.03),
    (1, 1, 2, 1, 1.00),
    (1, 1, 3, 0, 1.00),
    (1, 1, 4, -1, 1.02),
    (0.5, 1, 2, 1, 1.03),
    (0.5, 0.5, 4, 0, 0.98),
    (2, 2, 1, 0, 1.03),
)


def backward(
    current: RowTiles, arguments: Arguments, rows: float, warps: float, resident: int, stages: int
) -> Iterator[RowTiles]:
    """Yields nothing where no tile stays on its way, chunked rows would get company, or the warps exceed 32."""
    block_rows, num_warps = int(current.block_rows * rows), int(current.num_warps * warps)
    stages += current.stages
    if stages < 1 or block_rows < 1 or (current.chunks > 1 and block_rows > 1) or not 1 <= num_warps <= 32:
        return
    programs = min(max(1, -(-arguments["rows"] // block_rows)), resident * arguments["multiprocessors"])
    yield replace(current, programs=programs, block_rows=block_rows, num_warps=num_warps, stages=stages)


SWEEPS = (
    LaunchSweep(
        "norm.backward", LAYER, BOTH,
        question="Two programs of 8 warps are 16 of a multiprocessor's 64 warps: do more and smaller ones hide more, or"
        " do the tiles on their way do so?",
        prediction="Four programs of 4 warps and half the rows gain 2 % of the step; the"
        " backward alone reaches 80 % of the copy's bandwidth (24 µs at 8192 x 1024).",
        sizes=[Norm(4096, 512, 0.1), Norm(8192, 1024, 0.1), Norm(16384, 4096), Norm(8192, 8192)],
        rehearsal=Norm(6, 32, 0.1), table=TILES, settings=backward,
    ),
)  # fmt: skip
