"""Token embedding: gather with positions and dropout, and its gradient's two kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from triton.runtime.jit import JITFunction

from tfm.kernels import embedding, launch
from tools.check_kernels.cases.case import Case

TOKENS, VOCABULARY = 8192, 32768


def embedding_cases(every: bool) -> Iterator[Case]:
    """With dropout; the forward with the sinusoid, which takes more registers than a table; int64 tokens."""
    for dtype in ("bf16", "fp16", "fp32"):
        for columns in (16, 63, 512, 1000, 1024, 4096) if every else (512, 1000):
            data, size = f"*{dtype}:16", "i32" if columns % 16 else "i32:16"
            numbers = {"columns": size, "threshold": "i32", "site": "i32", "seed": "*i64:16"}

            for learned in (False, True) if every else (False,):
                tiles = launch.embedding_forward(TOKENS, columns)
                forward: dict[str, Any] = {
                    "tokens": "*i64:16",
                    "weight": data,
                    "positions": "*i64:16",
                    "y": data,
                    "count": "i32",
                    "period": "i32",
                }
                forward |= {"vocabulary": "i32", "places": "i32", "position_weight": data if learned else None}
                forward |= {"weight_stride": size, "position_stride": size, "scale": "fp32", "keep_scale": "fp32"}
                forward |= {"BLOCK_ROWS": tiles.block_rows, "BLOCK_COLUMNS": tiles.block_columns}
                name = f"embedding_forward{' learned' * learned} {columns} {dtype}"
                arguments = {**numbers, **forward}
                yield _case(name, embedding.embedding_forward_kernel, arguments, tiles)

            first, second = launch.embedding_backward(TOKENS // embedding.CHUNK, embedding.CHUNK, VOCABULARY, columns)
            sorted_tokens = {"tokens": "*i32:16", "order": "*i64:16", "chunks": "*fp32:16"}
            shared = numbers | sorted_tokens | {"dy": data, "rows": "i32", "dy_stride": size, "padding": "i32"}
            shared["CHUNK"] = embedding.CHUNK
            arguments = {**shared, "BLOCK_COLUMNS": first.block_columns}
            yield _case(f"embedding_chunks {columns} {dtype}", embedding.embedding_chunks_kernel, arguments, first)
            for sparse in (False, True):
                blocks = {"BLOCK_ROWS": second.block_rows, "BLOCK_COLUMNS": second.block_columns, "SPARSE": sparse}
                outputs = {"dweight": data, "indices": "*i64:16" if sparse else None, "scale": "fp32"}
                outputs |= {"count": "i32", "bits": "i32"}
                name = f"embedding_backward{' sparse' * sparse} {columns} {dtype}"
                arguments = {**shared, **outputs, **blocks}
                yield _case(name, embedding.embedding_backward_kernel, arguments, second)


def _case(name: str, kernel: JITFunction, arguments: dict[str, Any], tiles: launch.RowTiles) -> Case:
    return Case(name, kernel, arguments, tiles.num_warps, max_registers=tiles.max_registers)
