"""What LayerNorm and RMSNorm are compiled with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tfm.kernels import launch, norm
from tools.check_kernels.cases.case import DTYPES, Case

POWERS = [1 << bits for bits in range(4, 16)]
EVERYTHING = POWERS + [power - 1 for power in POWERS]


def norm_cases(operation: str, hungry: tuple[int, ...], every: bool, centred: bool) -> Iterator[Case]:
    """Bias, dropout, residual, fp32 parameters and every gradient, at the `hungry` columns or at all; those whose rows
    are of odd length need the most registers."""
    weighting = {"CENTRED": centred, "WEIGHT_OFFSET": 0.0 if centred else 1.0}
    for given, stored in DTYPES:
        dtype = given if given == stored else f"{given}+{stored}"
        data, stream, single = f"*{given}:16", f"*{stored}:16", "*fp32:16"
        numbers = {"rows": "i32", "threshold": "i32", "scale": "fp32", "site": "i32", "seed": "*i64:16"}
        saved = {"h": stream, "statistics": single, "weight": single}
        for columns in EVERYTHING if every else hungry:
            aligned = columns % 16 == 0

            tiles = launch.norm_forward(columns, columns, aligned)
            tensors: dict[str, Any] = {"x": data, "x_bias": single, "residual": stream, "y": stream, "eps": "fp32"}
            tensors |= {"bias": single if centred else None, "ROUND_FIRST": not centred}
            shape = _shape(columns, tiles, "columns", "x_stride", "residual_stride")
            yield Case(
                f"{operation}_forward {columns} {dtype}", norm.norm_forward_kernel,
                {**saved, **numbers, **weighting, **tensors, **shape},
                tiles.num_warps, max_registers=tiles.max_registers,
            )  # fmt: skip

            for x_bias in (False, True) if every else (True,):
                tiles = launch.norm_backward(columns, columns, aligned, x_bias or given != stored, multiprocessors=132)
                tensors = {"dy": stream, "dh": stream, "dx": data, "dresidual": stream, "partials": single}
                tensors |= {"DWEIGHT": True, "DBIAS": centred, "DX_BIAS": x_bias, "STAGES": tiles.stages}
                shape = _shape(columns, tiles, "columns", "dy_stride", "dh_stride", "h_stride")
                yield Case(
                    f"{operation}_backward{' x_bias' * x_bias} {columns} {dtype}", norm.norm_backward_kernel,
                    {**saved, **numbers, **weighting, **tensors, **shape},
                    tiles.num_warps, max_registers=tiles.max_registers,
                )  # fmt: skip


def _shape(columns: int, tiles: launch.RowTiles, *numbers: str) -> dict[str, Any]:
    blocks = {"BLOCK_ROWS": tiles.block_rows, "BLOCK_COLUMNS": tiles.block_columns, "CHUNKS": tiles.chunks}
    return {**blocks, **dict.fromkeys(numbers, "i32" if columns % 16 else "i32:16")}
