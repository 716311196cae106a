"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tfm.kernels import launch, rotary
from tools.check_kernels.cases.case import Case

TOKENS = 8192


def rotary_cases(every: bool) -> Iterator[Case]:
    """Queries and keys out of place, with positions; whole and partial rotation, halves and neighbours."""
    for dtype in ("bf16", "fp16", "fp32"):
        for columns, half in ((64, 32), (80, 40), (96, 12), (128, 64), (256, 32)) if every else ((80, 40), (256, 32)):
            for interleaved in (False, True):
                for in_place in (False, True) if every else (False,):
                    tiles = launch.rotary(TOKENS, half, columns)
                    tensors: dict[str, Any] = dict.fromkeys(("x", "y"), f"*{dtype}:16")
                    tensors |= dict.fromkeys(("other", "other_y"), None if in_place else f"*{dtype}:16")
                    tensors |= {"cos": "*fp32:16", "sin": "*fp32:16", "positions": "*i64:16"}
                    names = rotary.rotary_kernel.arg_names
                    steps = [name for name in names if name.endswith(("_batch", "_head", "_token", "angle_stride"))]
                    numbers: dict[str, Any] = dict.fromkeys(steps, "i32:16") | {"angle_column": 1}
                    sizes = ("tokens", "x_heads", "other_heads", "turned", "length", "period", "places", "x_groups")
                    numbers |= dict.fromkeys(sizes, "i32") | {"columns": "i32:16"}
                    numbers["half"] = "i32" if half % 16 else "i32:16"
                    flags = {"INTERLEAVED": interleaved, "INVERSE": True, "IN_PLACE": in_place}
                    flags |= {"BLOCK_TOKENS": tiles.block_tokens, "GROUP": tiles.group}
                    flags |= {"BLOCK_HALF": tiles.block_half, "BLOCK_REST": tiles.block_rest}
                    kind = " interleaved" * interleaved + " in place" * in_place
                    name = f"rotary{kind} {2 * half} of {columns} {dtype}"
                    yield Case(name, rotary.rotary_kernel, {**tensors, **numbers, **flags}, tiles.num_warps)
