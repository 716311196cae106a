"""The feed-forward network's matmuls with their epilogues, and the element-wise kernels beside cuBLAS."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton.language as tl

from tfm.kernels import launch
from tfm.kernels.feed_forward import activation_dropout, linear_activation
from tfm.ops.feed_forward import ACTIVATIONS
from tools.check_kernels.cases.case import CHIPS, Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUMBERS = {"rows": "i32", "threshold": "i32", "scale": "fp32", "site": "i32", "seed": "*i64:16"}
HIDDEN, DEPTH = 2048, 512
# Each takes smaller tiles than the one before, on 132 multiprocessors.
ROWS = (8192, 1024, 512, 64)


def feed_forward_cases(every: bool) -> Iterator[Case]:
    """Dropout, bias, and what the backward needs besides; GELU takes the most registers, plain and gated."""
    for gated in (False, True):
        yield from _matmul_cases(every, gated)
        yield from _element_cases(every, gated)


def _matmul_cases(every: bool, gated: bool) -> Iterator[Case]:
    """The largest tiles, those of small chips, and smaller ones with a depth that ends within a step."""
    everything = dict.fromkeys(product(ROWS, (90, 80), ("bf16", "fp16"), ("gelu", "relu")))
    everything |= dict.fromkeys(product(ROWS[:1], (90,), ("bf16",), ACTIVATIONS))
    hungriest = [(8192, 90, "bf16", "gelu"), (8192, 80, "bf16", "gelu"), (1024, 90, "bf16", "gelu")]
    # The one that keeps hidden instead of the pre-activation.
    hungriest += [] if gated else [(8192, 90, "bf16", "relu")]
    for rows, capability, dtype, activation in everything if every else hungriest:
        chip = launch.Chip(major=capability // 10, multiprocessors=132)
        data = f"*{dtype}:16"
        shape = dict.fromkeys(("columns", "depth", "x_stride", "dy_stride", "weight_stride", "up_stride"), "i32:16")
        common = {**NUMBERS, **shape, "weight": data, "hidden": data, "EVEN": rows == ROWS[0]}
        common["ACTIVATION"] = tl.constexpr(activation)
        name = f"{rows}/sm_{capability} {activation}{' gated' * gated} {dtype}"

        tiles = launch.linear_activation(rows, HIDDEN, DEPTH, gated, DTYPES[dtype], True, chip)
        tensors: dict[str, Any] = {
            "x": data,
            "pre": data,
            "up_weight": data if gated else None,
            "bias": None if gated else "*fp32:16",
        }
        arguments = {**common, **tensors, **_blocks(tiles)}
        kernel = linear_activation.linear_activation_kernel
        yield _matmul_case(f"linear_activation {name}", kernel, arguments, tiles, capability)

        tiles = launch.linear_activation_backward(rows, HIDDEN, DEPTH, DTYPES[dtype], True, chip)
        tensors = {"dy": data, "saved": data, "dpre": data, "partials": None if gated else "*fp32:16", "GATED": gated}
        arguments = {**common, **tensors, **_blocks(tiles)}
        kernel = linear_activation.linear_activation_backward_kernel
        yield _matmul_case(f"linear_activation_backward {name}", kernel, arguments, tiles, capability)


def _element_cases(every: bool, gated: bool) -> Iterator[Case]:
    """Rows of odd lengths take an address for each element."""
    everything = product((16, 63, 511, 512), DTYPES, ("gelu",))
    hungriest = [(511, "bf16", "gelu"), (512, "fp32", "gelu")]
    for columns, dtype, activation in everything if every else hungriest:
        data = f"*{dtype}:16"
        flags = {"ACTIVATION": tl.constexpr(activation), "GATED": gated}
        number = "i32" if columns % 16 else "i32:16"
        name = f"{columns} {activation}{' gated' * gated} {dtype}"

        tiles = launch.activation_dropout(8192, columns)
        blocks = {"columns": number, "BLOCK_ROWS": tiles.block_rows, "BLOCK_COLUMNS": tiles.block_columns}
        arguments = {**NUMBERS, **flags, **blocks, "pre": data, "hidden": data}
        kernel = activation_dropout.activation_dropout_kernel
        yield Case(f"activation_dropout {name}", kernel, arguments, tiles.num_warps)

        tiles = launch.activation_dropout_backward(8192, columns)
        blocks = {"columns": number, "BLOCK_ROWS": tiles.block_rows, "BLOCK_COLUMNS": tiles.block_columns}
        tensors: dict[str, Any] = {"dhidden": data, "saved": data, "dpre": data, "hidden": data}
        tensors["partials"] = None if gated else "*fp32:16"
        arguments = {**NUMBERS, **flags, **blocks, **tensors, "TILES": tiles.tiles}
        kernel = activation_dropout.activation_dropout_backward_kernel
        yield Case(f"activation_dropout_backward {name}", kernel, arguments, tiles.num_warps)


def _blocks(tiles: launch.MatmulTiles) -> dict[str, Any]:
    return {
        "SLICES": tiles.slices,
        "BLOCK_ROWS": tiles.block_rows,
        "BLOCK_COLUMNS": tiles.block_columns,
        "BLOCK_DEPTH": tiles.block_depth,
    }


def _matmul_case(name: str, kernel: Any, arguments: dict[str, Any], tiles: launch.MatmulTiles, capability: int) -> Case:
    arguments = {parameter: arguments[parameter] for parameter in kernel.arg_names}
    return Case(
        name, kernel, arguments, tiles.num_warps, tiles.num_stages, matrix=True,
        max_registers=tiles.max_registers, capabilities=CHIPS[8] if capability == 80 else CHIPS[9] + CHIPS[10],
    )  # fmt: skip
