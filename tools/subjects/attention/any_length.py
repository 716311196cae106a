"""Attention of any length, forward and backward, and the packing of its masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from tfm.kernels import attention
from tfm.kernels.launch.attention import any_length as tables
from tfm.operators.attention import Attention, AttentionBackward, AttentionMaskBits
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta

# D and Dv of each class of the tables; with `every` more of it: split in two, padded, unequal.
DIMS = {64: [(64, 64)], 128: [(128, 128)], 192: [(192, 128)], 256: [(256, 256)], 512: [(464, 464)]}
MORE_DIMS = {
    64: [(16, 16), (32, 48), (40, 64)],
    128: [(96, 96), (80, 128)],
    192: [(160, 128)],
    256: [(224, 256)],
    512: [(512, 512), (272, 128)],
}
# The calls that come to a row, in the order of the rows, the hungriest first.
KINDS = (("padded", "packed"), ("dropout",), ("bias", "mask"), ("bias dropout", "mask dropout"))
KERNELS = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
# What comes to the same rows by code of its own.
APART = ("distance dropout", "keys", "bias keys", "bias keys dropout")
# Longer than what the kernels for few keys take, and of no tile a multiple.
LENGTH = 300
# So few queries over so many keys that programs share these; the wider of each class of head dims.
FEW, MANY = 5, 4100
SHARED_DIMS = {"bf16": (64, 128, 256, 464), "fp32": (64, 256, 464)}


@dataclass(frozen=True)
class Family:
    """A table of each kernel, and the chips and types it is for; `wide`: HGMMA on sm_90."""

    name: str
    tables: tuple[tables.Table, tables.Table, tables.Table]
    major: int
    capabilities: tuple[int, ...] | None
    dtypes: tuple[str, ...]
    wide: bool = False


FAMILIES = (
    Family("wide", (tables.FORWARD, tables.QUERIES, tables.KEYS), 9, (90, 100), ("bf16", "fp16"), wide=True),
    Family(
        "narrow", (tables.NARROW_FORWARD, tables.NARROW_QUERIES, tables.NARROW_KEYS), 8, (80, 86, 89, 120),
        ("bf16", "fp16"),
    ),
    Family("exact", (tables.FP32_FORWARD, tables.FP32_QUERIES, tables.FP32_KEYS), 9, None, ("fp32", "tf32")),
)  # fmt: skip


def attention_cases(every: bool) -> Iterator[Case]:
    """Yields each row of the tables at the hungriest calls that come to it."""
    for family in FAMILIES:
        for kernel, table in zip(KERNELS, family.tables, strict=True):
            for width, rows in table.items():
                dims = DIMS[width] + (MORE_DIMS[width] if every else [])
                dtypes = family.dtypes if every else family.dtypes[:1]
                for kind, pair, dtype in product(_kinds(rows, every), dims, dtypes):
                    for case in _cases(family, pair, kind, dtype, every):
                        if case.name.split()[0] == kernel:
                            yield case
    for dim, kind in product((64, 128), APART):
        apart = attention_call((dim, dim), kind, "bf16", LENGTH)
        ways = (attention.attention, apart), (attention.attention_backward, backward_call(apart, "qkvs"))
        for launch, arguments in ways:
            label = f"{dim} {kind} bf16 wide"
            yield from described(label, launch, arguments, chip(9), matrix=KERNELS, capabilities=(90, 100))
    for dtype, widths in SHARED_DIMS.items():
        for dim, kind in product(widths, KINDS[-1] if every else KINDS[-1][:1]):
            shared = attention_call((dim, dim), kind, dtype, MANY, queries=FEW)
            yield from described(f"{dim} {kind} {dtype} shared", attention.attention, shared, chip(9))
    mask = meta(2, 4, 512, 512, dtype="i1")
    for dtype in ("i1", "fp32"):
        call = AttentionMaskBits(mask.to(torch.float32) if dtype == "fp32" else mask, meta(2, dtype="i32"), 0, 3, 3)
        yield from described(dtype, attention.attention_mask_bits, call, chip(9))


def _cases(family: Family, dims: tuple[int, int], kind: str, dtype: str, every: bool) -> Iterator[Case]:
    """Yields the kernels of one call each way; of two passes each by what it leaves out."""
    # A tile's scores may be large without a softcap, where what is computed does not say so: most calls are such.
    uncapped: set[str] = set()
    for softcap in (2.0,) if dtype in ("fp32", "tf32") or "bias" in kind else (None, 2.0):
        with products_of(dtype):
            call = attention_call(dims, kind, dtype, LENGTH, softcap)
            backward = backward_call(call, "qkvs")
            label = f"{dims[0]} {kind} {dtype} {family.name}"
            matrix = KERNELS if family.wide else ()
            for launch, arguments in ((attention.attention, call), (attention.attention_backward, backward)):
                for case in described(
                    label, launch, arguments, chip(family.major), matrix=matrix, capabilities=family.capabilities
                ):
                    parts = [case.name, *(name for name in ("dk", "dv") if case.arguments.get(name, label) is None)]
                    if softcap is not None:
                        if every or " no ".join(parts) not in uncapped:
                            yield replace(case, name=" no ".join(parts))
                    elif case.arguments.get("ARE_LARGE", True) is None:
                        uncapped.add(" no ".join(parts))
                        yield replace(case, name=" no ".join([f"{case.name} uncapped", *parts[1:]]))


def _kinds(rows: tuple[tables.AttentionTiles, ...], every: bool) -> list[str]:
    """Lists the kinds of call for each row; the last row serves whatever comes to it or to rows behind it."""
    found: list[str] = []
    for extras, tiles in enumerate(rows):
        served = KINDS[extras:] if tiles is rows[-1] else KINDS[extras : extras + 1]
        found += [kind for kinds in served for kind in kinds] if every else served[-1][: 2 if extras in (1, 2) else 1]
    return found


def attention_call(
    dims: tuple[int, int], kind: str, dtype: str, length: int, softcap: float | None = 2.0,
    mask_shape: tuple[int, int] = (2, 4), queries: int | None = None,
) -> Attention:  # fmt: skip
    """Returns a call of `length` keys, and as many queries where not told, with every rule: starts, sinks, a window.

    `kind` names what it has besides, of KINDS, a bias by "distance" or a mask of the "keys"; heads lie side by side in
    their rows, as projections have them, and two share keys. Of few queries the window is open to the left.
    """
    left = 3 if queries is None else None
    queries = length if queries is None else queries
    dtype = "fp32" if dtype == "tf32" else dtype
    vector, sinks = meta(2, dtype="i32"), meta(4, dtype="fp32")
    heads = meta(2, queries, 4, dims[0], dtype=dtype), *(meta(2, length, 2, dim, dtype=dtype) for dim in dims)
    rules: tuple[Any, ...] = (
        vector, meta(dtype="i64") if "dropout" in kind else None, queries, length, 0, left, 3, 0.1, softcap,
        0.1 if "dropout" in kind else 0.0, 0,
    )  # fmt: skip
    relative = meta(4, 257, dtype=dtype) if "distance" in kind else None
    if "packed" in kind:
        offsets = meta(3, dtype="i32")
        query, key, value = (x.flatten(0, 1) for x in heads)
        return Attention(query, key, value, None, None, None, None, sinks, relative, offsets, offsets, None, *rules)
    mask = meta(*mask_shape, queries, length, dtype="i1")
    words, reach = AttentionMaskBits(mask, None, 0, None, None).outputs()
    bias = meta(*mask_shape, queries, -(-length // 16) * 16, dtype=dtype)[..., :length] if "bias" in kind else None
    query, key, value = (x.transpose(1, 2) for x in heads)
    bits = (
        words if "mask" in kind else None, reach if "bias" in kind or "mask" in kind else None,
        meta(2, length, dtype="i1") if "keys" in kind else None,
    )  # fmt: skip
    return Attention(
        query, key, value, bias, *bits, sinks, relative, None, None, vector, *rules,
    )  # fmt: skip


def backward_call(call: Attention, wanted: str) -> AttentionBackward:
    """Returns the backward of a call, of the gradients whose letters are `wanted`; dlse has an odd stride."""
    output, statistics = call.outputs()
    dlse = statistics.new_empty((*statistics.shape[1:], 3))[..., 0]
    return AttentionBackward(output, dlse, output, statistics, [letter in wanted for letter in "qkvbsr"], *call)


@contextmanager
def products_of(dtype: str) -> Iterator[None]:
    """Has torch form products of fp32 by tf32 within the block where that is the dtype's name."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
