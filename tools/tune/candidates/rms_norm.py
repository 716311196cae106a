"""RMSNorm behind dropout and residual: what differs from LayerNorm is one sum a row and one parameter less.

The same functions of tfm.kernels.launch as for layer_norm, so a row that wins here must not lose there. Each tensor
once: 7.8 µs forward at 4096 x 1024 in bf16 on an H200, 125 µs at 16384 x 4096, and twice and a quarter that both ways.
"""

from __future__ import annotations

from benchmarks.bench_norm import RMS
from benchmarks.shapes import Norm
from benchmarks.suite import BOTH, FORWARD
from tools.tune.candidates.layer_norm import BACKWARD_TILES, FORWARD_TILES, backward, forward
from tools.tune.candidates.sweep import LaunchSweep

SIZES = [Norm(4096, 1024, 0.1), Norm(16384, 4096)]
REHEARSAL = Norm(6, 32, 0.1)

SWEEPS = (
    LaunchSweep(
        "norm.forward", RMS, FORWARD,
        question="Without the mean a row waits for one sum instead of two: are twice the rows a program still right?",
        prediction="93 % of the copy's bandwidth at 16384 x 4096 (134 µs); the order of the tiles is LayerNorm's.",
        sizes=SIZES, rehearsal=REHEARSAL, table=FORWARD_TILES, settings=forward,
    ),
    LaunchSweep(
        "norm.backward", RMS, BOTH,
        question="With one sum less beside the row, do three or four programs fit a multiprocessor?",
        prediction="Four programs of 4 warps and half the rows gain 2 % of the step as for LayerNorm; the backward"
        " alone reaches 3.6 TB/s at 16384 x 4096 (187 µs), where cuDNN is published at 3.8.",
        sizes=SIZES, rehearsal=REHEARSAL, table=BACKWARD_TILES, settings=backward,
    ),
)  # fmt: skip
