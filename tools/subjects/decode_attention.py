"""Attention of one query a row over a cache, and the sum of its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from tfm import ops
from tfm.kernels import decode_attention
from tfm.operators.decode_attention import DecodeAttention
from tools.check_kernels.case import Case
from tools.check_kernels.described import chip, described, meta
from tools.host import sizes
from tools.host.call import Call
from tools.subjects import inputs
from tools.subjects.inputs import Outputs, Pass, Tensors

ROWS, HEADS = 16, 32
# Keys of one piece, and of several.
SHORT, LONG = 256, 4000


def compiled(every: bool) -> Iterator[Case]:
    """Yields cases with ancestry, a latest key and pieces; a query head a key head, and several."""
    dims = (32, 64, 80, 128, 256, 512) if every else (64, 80, 128, 256, 512)
    for dtype, dim, group in product(("bf16", "fp16", "fp32"), dims, (1, 8)):
        label = f"{'grouped ' * (group > 1)}{dim} {dtype}"
        yield from _cases(label, dtype, dim, group, LONG, is_first=False)
        if every:
            yield from _cases(f"{label} short", dtype, dim, group, SHORT, is_first=False)
            yield from _cases(f"{label} without k v parents", dtype, dim, group, LONG, is_first=True)


def _cases(label: str, dtype: str, dim: int, group: int, capacity: int, is_first: bool) -> Iterator[Case]:
    """Yields the cases of one size; `is_first`: there is neither a latest key nor ancestors."""
    cache = meta(ROWS, capacity, HEADS // group, dim, dtype=dtype)
    latest = None if is_first else meta(ROWS, HEADS // group, dim, dtype=dtype)
    parents = None if is_first else meta(ROWS, capacity, dtype="i32")
    query, lengths = meta(ROWS, HEADS, dim, dtype=dtype), meta(ROWS, dtype="i32")
    call = DecodeAttention(query, cache, cache, lengths, parents, latest, latest, scale=0.125)
    # A tile of 16 query heads is too short for HGMMA. The latest key is stored behind those that are read.
    yield from described(label, decode_attention.decode_attention, call, chip(9), apart=("k_cache", "v_cache"))


def pass_decode_attention(new: Tensors) -> Iterator[Outputs]:
    rows = len(inputs.LENGTHS)
    own = torch.arange(rows, dtype=torch.int32, device=new.device)[:, None]
    # One piece of the keys and several; a place that a row writes is its own in every ancestry.
    for capacity, key_heads, parents in (
        (max(inputs.LENGTHS), inputs.HEADS, None),
        (inputs.LONG, inputs.KEY_HEADS, own.flip(0).repeat(1, inputs.LONG)),
    ):
        lengths = new.integers(0, capacity - 1, capacity)
        if parents is not None:
            parents[:, capacity - 3 :] = own
        query, key, value = (
            new(rows, heads, inputs.HEAD_DIM).detach() for heads in (inputs.HEADS, key_heads, key_heads)
        )
        key_cache, value_cache = (new(rows, capacity, key_heads, inputs.HEAD_DIM).detach() for _ in range(2))
        yield ops.decode_attention(query, key_cache, value_cache, lengths, parents, key=key, value=value)


PASSES: dict[str, Pass] = {
    "decode_attention": pass_decode_attention,
}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    found = []
    for name, capacity in (("", 32), (", long cache", 4096)):
        query, key, value = (torch.randn(sizes.SENTENCES, sizes.HEADS, sizes.DIM, dtype=sizes.HALF) for _ in range(3))
        keys, values = (
            torch.empty(sizes.SENTENCES, capacity, sizes.HEADS, sizes.DIM, dtype=sizes.HALF) for _ in range(2)
        )
        lengths = torch.full((sizes.SENTENCES,), 5, dtype=torch.int32)
        parents = torch.zeros(sizes.SENTENCES, capacity, dtype=torch.int32)
        call = partial(ops.decode_attention, query, keys, values, lengths, parents, key=key, value=value)
        found.append(Call(f"decode_attention{name}", call))
    return found
