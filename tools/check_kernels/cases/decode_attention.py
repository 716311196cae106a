"""Attention of one query a row over a cache, and the sum of its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from tfm.kernels import decode_attention
from tfm.operators.decode_attention import DecodeAttention
from tools.check_kernels.cases.case import Case
from tools.check_kernels.described import chip, described, meta

ROWS, HEADS = 16, 32
# Keys of one piece, and of several.
SHORT, LONG = 256, 4000


def decode_attention_cases(every: bool) -> Iterator[Case]:
    """With ancestry, a latest key and pieces; a query head a key head, and several."""
    dims = (32, 64, 80, 128, 256) if every else (64, 80, 128, 256)
    for dtype, dim, group in product(("bf16", "fp16", "fp32"), dims, (1, 8)):
        label = f"{'grouped ' * (group > 1)}{dim} {dtype}"
        yield from _cases(label, dtype, dim, group, LONG, is_first=False)
        if every:
            yield from _cases(f"{label} short", dtype, dim, group, SHORT, is_first=False)
            yield from _cases(f"{label} without k v parents", dtype, dim, group, LONG, is_first=True)


def _cases(label: str, dtype: str, dim: int, group: int, capacity: int, is_first: bool) -> Iterator[Case]:
    """`is_first`: nothing is behind the queries, neither a latest key nor ancestors."""
    cache = meta(ROWS, capacity, HEADS // group, dim, dtype=dtype)
    latest = None if is_first else meta(ROWS, HEADS // group, dim, dtype=dtype)
    parents = None if is_first else meta(ROWS, capacity, dtype="i32")
    query, lengths = meta(ROWS, HEADS, dim, dtype=dtype), meta(ROWS, dtype="i32")
    call = DecodeAttention(query, cache, cache, lengths, parents, latest, latest, scale=0.125)
    # A tile of 16 query heads is too short for HGMMA. The latest key is stored behind those that are read.
    yield from described(label, decode_attention.decode_attention, call, chip(9), apart=("k_cache", "v_cache"))
