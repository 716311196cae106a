"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernel_cases.case import Case
from tfm.kernels import launch, rotary

TOKENS = 8192


def rotary_cases(every: bool) -> Iterator[Case]:
    """Queries and keys out of place, with positions; whole and partial rotation, halves and neighbours."""
    for dtype in ("bf16", "fp16", "fp32"):
        for columns, half in ((64, 32), (80, 40), (96, 12), (128, 64), (256, 32)) if every else ((80, 40), (256, 32)):
            for interleaved in (False, True):
                for in_place in (False, True) if every else (False,):
                    heads = 0 if in_place else TOKENS
                    tiles = launch.rotary(TOKENS, heads, half, columns)
                    tensors = dict.fromkeys(("x", "y"), f"*{dtype}:16")
                    tensors |= dict.fromkeys(("other", "other_y"), None if in_place else f"*{dtype}:16")
                    tensors |= {"cos": "*fp32:16", "sin": "*fp32:16", "positions": "*i64:16"}
                    names = rotary.rotary_kernel.arg_names
                    steps = [name for name in names if name.endswith(("_batch", "_head", "_token", "angle_stride"))]
                    numbers = dict.fromkeys(steps, "i32:16") | {"angle_column": 1}
                    sizes = ("tokens", "x_heads", "other_heads", "turned", "length", "period", "places", "half")
                    numbers |= dict.fromkeys((*sizes, "columns", "x_programs"), "i32")
                    flags = {"INTERLEAVED": interleaved, "INVERSE": True, "IN_PLACE": in_place}
                    flags |= {"BLOCK_ROWS": tiles.block_rows, "BLOCK_HALF": tiles.block_half}
                    flags |= {"BLOCK_REST": tiles.block_rest}
                    kind = " interleaved" * interleaved + " in place" * in_place
                    name = f"rotary{kind} {2 * half} of {columns} {dtype}"
                    yield Case(name, rotary.rotary_kernel, {**tensors, **numbers, **flags}, tiles.num_warps)
