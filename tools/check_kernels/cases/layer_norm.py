"""LayerNorm behind bias, dropout and residual, and the sums of its partial gradients."""

from __future__ import annotations

from collections.abc import Iterator

from tfm.kernels import launch
from tfm.kernels import rows as row_kernels
from tools.check_kernels.cases.case import Case
from tools.check_kernels.cases.norm import norm_cases


def layer_norm_cases(every: bool) -> Iterator[Case]:
    """The norm's cases, centred; and what every kernel that leaves partial sums ends in."""
    yield from norm_cases("layer_norm", (63, 1024, 4095, 8192, 32767), every, centred=True)

    tiles = launch.sum_partials(512)
    tensors = dict.fromkeys(("partials", "first", "second", "third"), "*fp32:16")
    blocks = {"PARTS": 3, "BLOCK_PROGRAMS": tiles.block_rows, "BLOCK_COLUMNS": tiles.block_columns}
    arguments = {**tensors, **blocks, "programs": "i32", "columns": "i32"}
    yield Case("sum_partials fp32", row_kernels.sum_partials_kernel, arguments, tiles.num_warps)
