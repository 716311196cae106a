"""LayerNorm behind dropout and residual, and the sums of its partial gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_cases.case import DTYPES, Case
from tfm.kernels import launch, layer_norm
from tfm.kernels import rows as row_kernels


def layer_norm_cases(every: bool) -> Iterator[Case]:
    """Dropout, residual, fp32 parameters, every gradient; odd row strides wherever they need more registers."""
    powers = [1 << bits for bits in range(4, 16)]
    everything = powers + [power - 1 for power in powers]
    for given, stored in DTYPES:
        dtype = given if given == stored else f"{given}+{stored}"
        data, stream, single = f"*{given}:16", f"*{stored}:16", "*fp32:16"
        numbers = {"rows": "i32", "threshold": "i32", "scale": "fp32", "site": "i32", "seed": "*i64:16"}
        saved = {"h": stream, "mean": single, "rstd": single, "weight": single}

        for columns in everything if every else (63, 2047, 4095, 8191, 16384, 32767):
            tiles = launch.layer_norm_forward(columns, columns, columns % 16 == 0)
            tensors = {"x": data, "residual": stream, "bias": single, "y": stream, "eps": "fp32"}
            shape = _shape(columns, tiles, "columns", "x_stride", "residual_stride")
            arguments = {**saved, **numbers, **tensors, **shape}
            kernel = layer_norm.layer_norm_forward_kernel
            yield Case(f"layer_norm_forward {columns} {dtype}", kernel, arguments, tiles.num_warps)

        for columns in everything if every else (63, 2047, 4095, 8192, 32767, 32768):
            simple = columns % 16 == 0 and given == stored
            tiles = launch.layer_norm_backward(columns, columns, simple, multiprocessors=132)
            tensors = {"dy": stream, "dh": stream, "dx": data, "dresidual": stream, "partials": single}
            shape = _shape(columns, tiles, "columns", "dy_stride", "dh_stride", "h_stride")
            arguments = {**saved, **numbers, **tensors, **shape}
            kernel = layer_norm.layer_norm_backward_kernel
            yield Case(f"layer_norm_backward {columns} {dtype}", kernel, arguments, tiles.num_warps)

    tiles = launch.sum_partials(512)
    tensors = {"partials": "*fp32:16", "dweight": "*fp32:16", "dbias": "*fp32:16"}
    blocks = {"BLOCK_PROGRAMS": tiles.block_rows, "BLOCK_COLUMNS": tiles.block_columns}
    arguments = {**tensors, **blocks, "programs": "i32", "columns": "i32"}
    yield Case("sum_partials fp32", row_kernels.sum_partials_kernel, arguments, tiles.num_warps)


def _shape(columns: int, tiles: launch.RowTiles, *numbers: str) -> dict[str, Any]:
    blocks = {"BLOCK_ROWS": tiles.block_rows, "BLOCK_COLUMNS": tiles.block_columns, "CHUNKS": tiles.chunks}
    return {**blocks, **dict.fromkeys(numbers, "i32" if columns % 16 else "i32:16")}
