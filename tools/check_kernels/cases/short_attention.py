"""Attention over few keys, the gradient of an attention's bias, and its weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from tfm.kernels import launch
from tfm.kernels.attention import bias_gradient, short_backward, short_forward, weights
from tools.check_kernels.cases.case import CHIPS, Case, merged

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What changes the code most: a bias, a mask as bits, neither on packed sequences.
KINDS = ("bias", "mask", "packed")
# What the second of two passes of the backward makes.
SECOND_PASS = ("dv", "delta", "sinks", "sink_partials")
MATRICES = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "weights")
NUMBERS = ("heads", "group", "query_size", "key_size", "start", "left", "right", "threshold", "site", "splits", "tiles")
COUNTS = ("query_tiles", "key_tiles", "members", "bias_heads", "dlse_s", "size")
STEPS = ("dbias_", "row_", "dlse_", "words_", "reach_")


def short_attention_cases(every: bool) -> Iterator[Case]:
    """Every rule and dropout at once; head dims and keys at the rows of the launch settings, for either tensor core."""
    yield from merged((*_forward_cases(every), *_backward_cases(every)))


def _forward_cases(every: bool) -> Iterator[Case]:
    tables = ("bf16", launch.SHORT_FORWARD), ("fp32", launch.SHORT_FORWARD_FP32)
    for dtype, dim, keys, kind, major in _rows(tables, every):
        tiles = launch.short_attention_forward(keys, keys, dim, TYPES[dtype], kind == "bias", kind == "mask", major)
        if tiles is not None and tiles.block_keys == keys:
            kernel = short_forward.short_attention_forward_kernel
            blocks = {"BLOCK_QUERIES": tiles.block_queries, "BLOCK_KEYS": keys}
            name = f"short_attention_forward {tiles.block_queries}x{keys} of {dim} {kind} {dtype}"
            matrix = _is_wide(dtype, tiles.block_queries)
            arguments = _arguments(kernel, dtype, dim, kind) | blocks
            yield _case(name, kernel, arguments, tiles, matrix, major)


def _backward_cases(every: bool) -> Iterator[Case]:
    """Both passes where there are two: what one of them makes is absent from the other."""
    tables = ("bf16", launch.SHORT_BACKWARD), ("fp32", launch.SHORT_BACKWARD_FP32)
    for dtype, dim, keys, kind, major in _rows(tables, every):
        tiles = launch.short_attention_backward(keys, keys, dim, TYPES[dtype], kind == "bias", kind == "mask", major)
        if tiles is not None and tiles.block_keys == keys:
            kernel = short_backward.short_attention_backward_kernel
            blocks = {"BLOCK_QUERIES": tiles.block_queries, "BLOCK_KEYS": keys}
            made = {"": ()} if tiles.passes == 1 else {" dv": ("dq", "dk"), " dq dk": SECOND_PASS}
            for part, absent in made.items():
                name = f"short_attention_backward {tiles.block_queries}x{keys} of {dim} {kind}{part} {dtype}"
                arguments = _arguments(kernel, dtype, dim, kind) | blocks | dict.fromkeys(absent)
                matrix = _is_wide(dtype, keys)
                yield _case(name, kernel, arguments, tiles, matrix, major)


def _case(name: str, kernel: Any, arguments: dict[str, Any], tiles: Any, matrix: bool, major: int) -> Case:
    name += " capped" * (tiles.max_registers is not None)
    return Case(
        name, kernel, arguments, tiles.num_warps,
        matrix=matrix, max_registers=tiles.max_registers, capabilities=CHIPS[major],
    )  # fmt: skip


def score_cases(every: bool) -> Iterator[Case]:
    """The bias gradient, and the weights, at the head dims of the launch settings."""
    yield from merged(_score_cases(every))


def _score_cases(every: bool) -> Iterator[Case]:
    shared = {"SHARED_HEADS": True, "SHARED_QUERIES": False, "dbias": "*fp32:16"}
    hungriest = ("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 128)
    for dtype, dim in product(TYPES, (16, 32, 64, 128, 256)) if every else hungriest:
        kernel = bias_gradient.bias_gradient_kernel
        for major, chips in CHIPS.items():
            tiles = launch.bias_gradient(dim, TYPES[dtype], major)
            blocks = {"BLOCK_QUERIES": tiles.block_queries, "BLOCK_KEYS": tiles.block_keys}
            arguments = _arguments(kernel, dtype, dim, "bias") | blocks | shared
            name = f"bias_gradient {tiles.block_queries}x{tiles.block_keys} of {dim} {dtype}"
            matrix = _is_wide(dtype, tiles.block_queries)
            yield Case(name, kernel, arguments, tiles.num_warps, tiles.num_stages, matrix=matrix, capabilities=chips)

        kernel = weights.attention_weights_kernel
        for (major, chips), kind in product(CHIPS.items(), ("bias", "mask") if every else ("bias",)):
            tiles = launch.attention_weights(TYPES[dtype], major)
            arguments = _arguments(kernel, dtype, dim, kind)
            arguments |= {"BLOCK_QUERIES": tiles.block_queries, "BLOCK_KEYS": tiles.block_keys}
            name = f"attention_weights {tiles.block_queries}x{tiles.block_keys} of {dim} {kind} {dtype}"
            matrix = _is_wide(dtype, tiles.block_queries)
            yield Case(name, kernel, arguments, tiles.num_warps, matrix=matrix, capabilities=chips)

    arguments = {"partials": "*fp32:16", "dbias": "*bf16:16", "splits": "i32", "size": "i32", "BLOCK": 1024}
    yield Case("sum_splits bf16", bias_gradient.sum_splits_kernel, arguments, 4)


def _rows(tables: Any, every: bool) -> Iterator[tuple[str, int, int, str, int]]:
    """(dtype, head dim, keys, kind, major) of every row of the tables; narrower dims and fp16, too, where `every`.

    Elsewhere all of them in bf16 at 64, where most models are, and of the others the longest with its hungriest kind.
    """
    for dtype, table in tables:
        for dim, keys in table:
            common = dtype == "bf16" and dim == 64
            if not every and not common and (dim, keys) != max(row for row in table if row[0] == dim):
                continue
            dims = (16, 32, 64) if every and dim == 64 else (dim,)
            dtypes = ("bf16", "fp16") if every and dtype == "bf16" else (dtype,)
            yield from product(dtypes, dims, (keys,), KINDS if every or common else KINDS[:1], CHIPS)


def _is_wide(dtype: str, rows: int) -> bool:
    """Whether sm_90 must show HGMMA: it takes 64 rows. Sentences are shorter, and their tiles HMMA's; fp32 is exact."""
    return dtype != "fp32" and rows >= 64


def _arguments(kernel: Any, dtype: str, dim: int, kind: str) -> dict[str, Any]:
    """Of `kernel`, tiles apart: side by side in their rows, as projections are, of any other stride."""
    absent = {
        "bias": {"words", "cu_seq_q", "cu_seq_k"},
        "mask": {"bias", "cu_seq_q", "cu_seq_k", "delta"},
        "packed": {"bias", "words", "reach", "key_lengths", "delta"},
    }[kind]
    blocks = {"DIM": dim, "VALUE_DIM": dim, "BLOCK_DIM": dim, "BLOCK_VALUE_DIM": dim}
    constants = {**blocks, "PRECISION": "ieee" if dtype == "fp32" else "tf32", **dict.fromkeys(absent)}
    found: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            found[name] = constants[name]
        elif name in (*MATRICES, "bias"):
            found[name] = f"*{dtype}:16"
        elif name in ("statistics", "dlse", "delta", "sinks", "sink_partials"):
            found[name] = "*fp32:16"
        elif name == "seed":
            found[name] = "*i64:16"
        elif name in ("words", "reach", "starts", "cu_seq_q", "cu_seq_k", "key_lengths"):
            found[name] = "*i32:16"
        elif name in ("inner", "outer", "scale", "keep_scale"):
            found[name] = "fp32"
        elif name.endswith("_d") or name in ("bias_k", "dbias_k"):
            found[name] = 1
        elif name in NUMBERS + COUNTS or name.startswith(STEPS):
            found[name] = "i32"
        else:
            found[name] = "i32:16"
    return found
