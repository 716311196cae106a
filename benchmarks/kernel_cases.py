"""What check_kernels compiles: every kernel at its launch settings, with the flags that need the most registers.

A kernel's arguments are written as in triton.tools.compile: a string is a type (":16" where the address or the number
is a multiple of 16), anything else a constant, None an absent tensor. A new kernel adds its function to ALL.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction

from tfm.kernels import launch, layer_norm

DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Case:
    """One compilation: `name` for the table, `arguments` by parameter name."""

    name: str
    kernel: JITFunction
    arguments: dict[str, Any]
    num_warps: int


def layer_norm_cases(every: bool) -> Iterator[Case]:
    """Dropout, residual, fp32 parameters and both gradients; columns that are and are not a multiple of 16."""
    narrow = [16, 32, 64, 256, 512, 1024] if every else [64]
    for columns in [*narrow, 2048, 4096, 8192, 16384, 32768]:
        for dtype in DTYPES:
            for alignment in (":16", ""):
                pointer, number = f"*{dtype}:16", f"i32{alignment}"
                shared = dict(h=pointer, mean="*fp32:16", rstd="*fp32:16", weight="*fp32:16", seed="*i64:16")
                shared |= dict(rows="i32", columns=number, threshold="i32", scale="fp32", site="i32")
                name = f"{columns if alignment else columns - 1} {dtype}"

                tiles = launch.layer_norm_forward(columns, columns)
                arguments = dict(x=pointer, residual=pointer, bias="*fp32:16", y=pointer, eps="fp32")
                arguments |= dict(x_stride=number, residual_stride=number)
                blocks = dict(BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns)
                forward = layer_norm.layer_norm_forward_kernel
                yield Case(f"layer_norm_forward {name}", forward, shared | arguments | blocks, tiles.num_warps)

                tiles = launch.layer_norm_backward(columns, columns, multiprocessors=132)
                arguments = dict(dy=pointer, dh=pointer, dx=pointer, dresidual=pointer, partials="*fp32:16")
                arguments |= dict(dy_stride=number, dh_stride=number, h_stride=number)
                blocks = dict(BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=tiles.block_columns, CHUNKS=tiles.chunks)
                backward = layer_norm.layer_norm_backward_kernel
                yield Case(f"layer_norm_backward {name}", backward, shared | arguments | blocks, tiles.num_warps)

    sums = launch.sum_partials(512)
    arguments = dict(partials="*fp32:16", dweight="*fp32:16", dbias="*fp32:16", programs="i32", columns="i32")
    blocks = dict(BLOCK_PROGRAMS=sums.block_rows, BLOCK_COLUMNS=sums.block_columns)
    yield Case("sum_partials", layer_norm.sum_partials_kernel, arguments | blocks, sums.num_warps)


ALL = (layer_norm_cases,)
