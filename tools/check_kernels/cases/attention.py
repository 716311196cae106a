"""Attention of any length, forward and backward, and the packing of its masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from tfm.kernels import launch
from tfm.kernels.attention import backward_keys, backward_queries, forward, mask_bits
from tfm.kernels.launch.attention import any_length as tables
from tools.check_kernels.cases.case import Case

# D and Dv of each class of the tables; with `every` more of it: split in two, padded, unequal.
DIMS = {64: [(64, 64)], 128: [(128, 128)], 192: [(192, 128)], 256: [(256, 256)]}
MORE_DIMS = {64: [(16, 16), (32, 48), (40, 64)], 128: [(96, 96), (80, 128)], 192: [(160, 128)], 256: [(224, 256)]}
# The calls that come to a row, by the number of its extras, the hungriest first. Each has softcap, a window on both
# sides, a start for each sequence and heads that share keys.
KINDS = (("padded", "packed"), ("bias", "dropout", "mask"), ("bias dropout", "mask dropout"))
FORWARD, QUERIES, KEYS = (
    ("attention_forward", forward.attention_forward_kernel),
    ("attention_backward_queries", backward_queries.attention_backward_queries_kernel),
    ("attention_backward_keys", backward_keys.attention_backward_keys_kernel),
)


@dataclass(frozen=True)
class Family:
    """A table of each kernel, and the chips and types it is for; `wide`: HGMMA on sm_90."""

    name: str
    tables: tuple[tables.Table, tables.Table, tables.Table]
    capabilities: tuple[int, ...] | None
    dtypes: tuple[str, ...]
    wide: bool = False


FAMILIES = (
    Family("wide", (tables.FORWARD, tables.QUERIES, tables.KEYS), (90, 100), ("bf16", "fp16"), wide=True),
    Family(
        "narrow", (tables.NARROW_FORWARD, tables.NARROW_QUERIES, tables.NARROW_KEYS), (80, 86, 89, 120),
        ("bf16", "fp16"),
    ),
    Family("exact", (tables.FP32_FORWARD, tables.FP32_QUERIES, tables.FP32_KEYS), None, ("fp32", "tf32")),
)  # fmt: skip


def attention_cases(every: bool) -> Iterator[Case]:
    """Each row of the tables at the hungriest calls that come to it."""
    for family in FAMILIES:
        for (name, kernel), table in zip((FORWARD, QUERIES, KEYS), family.tables, strict=True):
            for width, rows in table.items():
                dims = DIMS[width] + (MORE_DIMS[width] if every else [])
                dtypes = family.dtypes if every else family.dtypes[:1]
                for (tiles, kind), pair, dtype in product(_calls(rows, every), dims, dtypes):
                    blocks = {"BLOCK_QUERIES": tiles.block_queries, "BLOCK_KEYS": tiles.block_keys}
                    arguments = _arguments(kernel, dtype, pair, kind) | blocks
                    if "TILE" in kernel.arg_names:
                        arguments["TILE"] = _row(family.tables[1][width], kind).block_queries
                    passes = ({},) if tiles.passes == 1 else ({"dk": None}, {"dv": None})
                    for absent, cap in product(passes, _caps(kernel, arguments)):
                        without = "".join(f" no {gradient}" for gradient in absent) + " uncapped" * bool(cap)
                        yield Case(
                            f"{name} {pair[0]} {kind}{without} {dtype} {family.name}", kernel, arguments | absent | cap,
                            tiles.num_warps, tiles.num_stages, matrix=family.wide,
                            max_registers=tiles.max_registers, capabilities=family.capabilities,
                        )  # fmt: skip
    for dtype, words in (("i1", "*i32:16"), ("fp32", None)):
        tiles = launch.mask_bits(512)
        arguments = {
            "mask": f"*{dtype}:16", "words": words, "reach": "*i32:16", "starts": "*i32:16",
            **dict.fromkeys(("mask_b", "mask_h", "mask_q", "words_b", "words_h", "words_q", "reach_b"), "i32"),
            "mask_k": 1, "reach_h": "i32",
            **dict.fromkeys(("heads", "word_sequences", "queries", "keys", "start", "left", "right"), "i32"),
            "BLOCK_QUERIES": tiles.block_rows, "BLOCK_KEYS": tiles.block_columns,
        }  # fmt: skip
        yield Case(f"mask_bits {dtype}", mask_bits.mask_bits_kernel, arguments, tiles.num_warps)


def _calls(rows: tuple[tables.AttentionTiles, ...], every: bool) -> list[tuple[tables.AttentionTiles, str]]:
    """Rows and kinds of call; the last row serves whatever has as many extras or more."""
    found = []
    for extras, tiles in enumerate(rows):
        served = KINDS[extras:] if tiles is rows[-1] else KINDS[extras : extras + 1]
        if every:
            found += [(tiles, kind) for kinds in served for kind in kinds]
        else:
            found += [(tiles, kind) for kind in served[-1][: 2 if extras == 1 else 1]]
    return found


def _caps(kernel: JITFunction, arguments: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """With a softcap, and where a tile's scores may be large without one, that, too."""
    branches = "ARE_LARGE" in kernel.arg_names and not arguments["ARE_LARGE"]
    return ({}, {"outer": None, "ARE_LARGE": None}) if branches else ({},)


def _row(rows: tuple[tables.AttentionTiles, ...], kind: str) -> tables.AttentionTiles:
    """The row that serves this kind of call."""
    extras = next(extras for extras, kinds in enumerate(KINDS) if kind in kinds)
    return rows[min(extras, len(rows) - 1)]


def _arguments(kernel: JITFunction, dtype: str, dims: tuple[int, int], kind: str) -> dict[str, Any]:
    """Of `kernel`, tiles apart; heads lie side by side in their rows, as projections have them."""
    data = "*fp32:16" if dtype == "tf32" else f"*{dtype}:16"
    dim, value_dim = dims
    kind_of_float = torch.float32 if data == "*fp32:16" else torch.bfloat16
    (first, rest), (value_first, value_rest) = (launch.split_dim(x, kind_of_float) for x in dims)
    found: dict[str, Any] = {
        "DIM": dim, "DIM_FIRST": first, "DIM_REST": rest,
        "VALUE_DIM": value_dim, "VALUE_FIRST": value_first, "VALUE_REST": value_rest,
        "PRECISION": "tf32" if dtype == "tf32" else "ieee", "IS_WIDE": forward.is_wide(dim), "IS_GROUPED": True,
        "ARE_LARGE": data == "*fp32:16" or "bias" in kind,
    }  # fmt: skip
    is_packed = kind == "packed"
    absent = {
        "bias": "bias" not in kind,
        "words": "mask" not in kind,
        "reach": "bias" not in kind and "mask" not in kind,
        "seed": "dropout" not in kind,
        "key_lengths": is_packed,
        "cu_seq_q": not is_packed,
        "cu_seq_k": not is_packed,
    }
    for name in kernel.arg_names:
        if name in found or name == "TILE":
            continue
        if absent.get(name):
            found[name] = None
        elif name in ("q", "k", "v", "bias", "out", "dout", "dq", "dk", "dv"):
            found[name] = data
        elif name in ("statistics", "dlse", "delta", "sinks", "sink_partials"):
            found[name] = "*fp32:16"
        elif name == "seed":
            found[name] = "*i64:16"
        elif name in ("words", "reach", "key_lengths", "starts", "cu_seq_q", "cu_seq_k"):
            found[name] = "*i32:16"
        elif name in ("inner", "outer", "scale", "keep_scale"):
            found[name] = "fp32"
        elif name.endswith("_d") or name == "bias_k":
            found[name] = 1
        elif name.partition("_")[0] in ("q", "k", "v", "bias", "out", "dout", "dq", "dk", "dv"):
            found[name] = "i32:16"
        else:
            found[name] = "i32"
    return {name: found[name] for name in kernel.arg_names if not name.startswith(("BLOCK_", "TILE"))}
