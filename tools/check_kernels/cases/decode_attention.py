"""Attention of one query a row over a cache, and the sum of its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from tfm.kernels import decode_attention, launch
from tools.check_kernels.cases.case import Case

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS, NUMBERS = ("partials", "statistics"), ("lengths", "parents")
VARYING = ("key_heads", "group", "tiles", "splits", "capacity", "cache_rows", "heads", "length_step")


def decode_attention_cases(every: bool) -> Iterator[Case]:
    """With ancestry, a latest key and pieces; a query head a key head, and several."""
    for dtype, dim, group in product(TYPES, (32, 64, 80, 128, 256) if every else (64, 80, 128, 256), (1, 8)):
        tiles = launch.decode_attention(dim, group, TYPES[dtype])
        block_dim = 1 << (dim - 1).bit_length()
        blocks = {
            "DIM": dim, "VALUE_DIM": dim, "BLOCK_DIM": block_dim, "BLOCK_VALUE_DIM": block_dim,
            "BLOCK_HEADS": tiles.block_heads, "BLOCK_KEYS": tiles.block_keys, "SPLIT_KEYS": tiles.split_keys,
            "STAGES": tiles.stages, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        }  # fmt: skip
        kernel = decode_attention.decode_attention_kernel
        for absent in ((), FLOATS, ("k", "v", "parents")) if every else ((),):
            name = " ".join((f"decode_attention {tiles.block_keys} of {dim}", *("grouped",) * (group > 1), dtype))
            name += f" without {' '.join(absent)}" * bool(absent)
            arguments = _arguments(kernel, dtype, blocks | dict.fromkeys(absent))
            # A tile of 16 query heads is too short for HGMMA.
            # The latest key is stored behind those that are read.
            yield Case(
                name, kernel, arguments, tiles.num_warps, max_registers=tiles.max_registers,
                apart=("k_cache", "v_cache"),
            )  # fmt: skip
        if group == 1:
            kernel = decode_attention.combine_splits_kernel
            blocks = {"HAS_LATEST": True, "BLOCK_SPLITS": launch.COMBINED_SPLITS} | {
                name: blocks[name] for name in ("VALUE_DIM", "BLOCK_VALUE_DIM", "SPLIT_KEYS")
            }
            yield Case(f"combine_splits of {dim} {dtype}", kernel, _arguments(kernel, dtype, blocks), 1)


def _arguments(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, Any]:
    """Of `kernel`, rows of every tensor beginning at multiples of 16 numbers."""
    found: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            found[name] = constants[name]
        elif name in FLOATS:
            found[name] = "*fp32:16"
        elif name in NUMBERS:
            found[name] = "*i32:16"
        elif name in VARYING:
            found[name] = "i32"
        elif name == "scale":
            found[name] = "fp32"
        elif name == "parents_place":
            found[name] = 1
        else:
            found[name] = f"*{dtype}:16" if "_" not in name or name.endswith("_cache") else "i32:16"
    return found
