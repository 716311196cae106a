"""Launch settings as pure functions of the problem: no autotuning, the same on every run, testable without a GPU.

Block sizes never depend on the number of rows, so that a row's numbers do not change with the batch around it.
"""

from tfm.kernels.launch.device import are_aligned, multiprocessors
from tfm.kernels.launch.rows import RowTiles, layer_norm_backward, layer_norm_forward, sum_partials

__all__ = [
    "RowTiles",
    "are_aligned",
    "layer_norm_backward",
    "layer_norm_forward",
    "multiprocessors",
    "sum_partials",
]
