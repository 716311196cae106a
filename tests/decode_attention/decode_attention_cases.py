"""What the tests of attention over a cache share: caches with NaN wherever nothing may be read, and what is promised.

The ancestry of a row is any, but for the places that other rows are just about to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import torch
from torch import Tensor

from tfm import ops

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """`shape`: capacity, query heads, key heads, D, Dv. A row for each of `lengths`."""

    lengths: Sequence[int]
    shape: tuple[int, int, int, int, int]
    cache_rows: int | None = None
    has_parents: bool = True
    has_latest: bool = True
    scale: float | None = None


# Rows without keys, whole and half vectors of keys and columns, several tiles, grouped heads, a cache of other rows.
PROBLEMS = {
    "one key": Problem([1], (1, 1, 1, 1, 1)),
    "one row each": Problem([3, 0, 5, 1], (5, 2, 2, 16, 16), has_parents=False),
    "beam": Problem([17, 17, 17, 0, 17], (32, 4, 4, 32, 32)),
    "beam, cached": Problem([17, 3, 16, 1], (20, 2, 2, 17, 33), has_latest=False),
    "grouped": Problem([40, 65, 33], (70, 6, 2, 24, 40), scale=-0.3),
    "multi-query, two tiles of heads": Problem([9, 2], (9, 17, 1, 16, 5), has_parents=False),
    "widest": Problem([9, 33], (33, 2, 2, 464, 300)),
    "widest, grouped": Problem([9, 33], (33, 4, 2, 300, 464), has_latest=False),
    "few rows of a larger cache": Problem([12, 7], (13, 2, 2, 8, 8), cache_rows=5),
    "many rows of a smaller cache": Problem([12, 7, 12, 3], (13, 2, 1, 8, 8), cache_rows=2, has_latest=False),
    "pieces": Problem([530, 256, 0, 257, 512], (530, 1, 1, 8, 8)),
    "pieces, grouped": Problem([300, 20], (600, 4, 2, 16, 24), has_parents=False, has_latest=False),
}


def make(problem: Problem, device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The arguments of ops.decode_attention."""
    rows, (capacity, heads, key_heads, dim, value_dim) = len(problem.lengths), problem.shape
    count = problem.cache_rows or rows
    parents = torch.full((rows, capacity), -(2**31), dtype=torch.int32)
    caches = [torch.full((count, capacity, key_heads, columns), torch.nan) for columns in (dim, value_dim)]
    written = {(r, length - 1) for r, length in enumerate(problem.lengths)} if problem.has_latest else set()
    for r, length in enumerate(problem.lengths):
        for t in range(max(length - 1, 0) if problem.has_latest else length):
            free = [p for p in range(count) if (p, t) not in written] if problem.has_parents else [r]
            parents[r, t] = p = free[int(torch.randint(len(free), ()))]
            for cache in caches:
                cache[p, t] = torch.randn(cache.shape[2:])
    arguments: dict[str, Any] = {"query": torch.randn(rows, heads, dim), "key_cache": caches[0]}
    arguments |= {"value_cache": caches[1], "lengths": torch.tensor(problem.lengths, dtype=torch.int32)}
    arguments |= {"parents": parents if problem.has_parents else None, "scale": problem.scale}
    latest = [torch.randn(rows, key_heads, columns) for columns in (dim, value_dim)]
    arguments |= dict(zip(("key", "value"), latest, strict=True)) if problem.has_latest else {}
    return to(arguments, device, dtype)


def to(arguments: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Copies, floating-point numbers in `dtype`."""
    return {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }


def walked(arguments: dict[str, Any]) -> Tensor:
    """Each row's keys and values fetched from its ancestors one by one, and attended to by the oracle."""
    outputs = []
    for r, length in enumerate(arguments["lengths"].tolist()):
        parents = [r] * length if arguments["parents"] is None else arguments["parents"][r, :length].tolist()
        sides = []
        for cache, latest in (("key_cache", "key"), ("value_cache", "value")):
            places = [(parents[t], t) for t in range(length)]
            own = [arguments[latest][r]] if latest in arguments and length else []
            found = [arguments[cache][place] for place in places[: length - len(own)]] + own
            empty = arguments[cache].new_zeros((0, *arguments[cache].shape[2:]))
            sides.append((torch.stack(found) if found else empty).transpose(0, 1)[None])
        query = arguments["query"][r][None, :, None]
        allowed = torch.ones(1, query.shape[1], 1, length, dtype=torch.bool)
        output, _ = oracle.attention(query, *sides, allowed, scale=arguments["scale"])
        outputs.append(output[0, :, 0])
    return torch.stack(outputs)


def assert_matches(arguments: dict[str, Any], impl: str) -> Tensor:
    """The output of `impl` is the reference's to the oracle's tolerance; in the caches the latest place is new."""
    device, dtype = arguments["query"].device, arguments["query"].dtype
    before, wide, plain = (to(arguments, device, dtype) for dtype in (dtype, torch.float64, dtype))
    output = ops.decode_attention(**arguments, impl=impl)
    truth = ops.decode_attention(**wide, impl="reference")
    expected = ops.decode_attention(**plain, impl="reference")
    oracle.assert_matches(output, truth, expected)
    for name in ("key_cache", "value_cache"):
        stored = before[name]
        for row, length in enumerate(arguments["lengths"].tolist()):
            if "key" in arguments and length > 0:
                stored[row, length - 1] = arguments[name.removesuffix("_cache")][row]
        for caches in (arguments, plain):
            torch.testing.assert_close(caches[name], stored, rtol=0, atol=0, equal_nan=True)
    return output


def as_views(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in other strides: heads or places outermost, parts of wider tensors, every second element."""
    viewed = dict(arguments)
    viewed["key_cache"] = arguments["key_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    viewed["value_cache"] = arguments["value_cache"].transpose(0, 1).contiguous().transpose(0, 1)
    viewed["query"] = torch.cat((arguments["query"], arguments["query"]), dim=1)[:, : arguments["query"].shape[1]]
    viewed["lengths"] = arguments["lengths"].repeat_interleave(2)[::2]
    for name in ("key", "value"):
        viewed[name] = arguments[name].repeat_interleave(2, dim=-1)[..., ::2]
    if arguments["parents"] is not None:
        viewed["parents"] = arguments["parents"].t().contiguous().t()
    return viewed


def assert_more_capacity_gives_the_same_bits(arguments: dict[str, Any], impl: str, capacities: Sequence[int]) -> None:
    outputs = []
    for capacity in capacities:
        given = to(arguments, arguments["query"].device, arguments["query"].dtype)
        for name in ("key_cache", "value_cache"):
            cache = given[name]
            given[name] = cache.new_full((len(cache), capacity, *cache.shape[2:]), torch.nan)
            given[name][:, : cache.shape[1]] = cache
        parents = given["parents"]
        given["parents"] = parents.new_full((len(parents), capacity), -1)
        given["parents"][:, : parents.shape[1]] = parents
        outputs.append(ops.decode_attention(**given, impl=impl))
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


def assert_reordering_the_table_is_reordering_the_cache(impl: str, device: torch.device, dtype: torch.dtype) -> None:
    """Four steps of a beam: one cache stays where it is, one is copied row by row, and both give the same."""
    rows, capacity, heads, dim = 4, 4, 2, 8
    tables = torch.arange(rows, dtype=torch.int32, device=device)[:, None].repeat(1, capacity)
    stays, copied = (
        [torch.full((rows, capacity, heads, dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
        for _ in range(2)
    )
    for length in range(1, capacity + 1):
        query, key, value = torch.randn(3, rows, heads, dim, device=device).to(dtype).unbind()
        lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
        latest = {"key": key, "value": value, "impl": impl}
        found = ops.decode_attention(query, *stays, lengths, tables, **latest)
        assert torch.equal(found, ops.decode_attention(query, *copied, lengths, **latest))
        parent = torch.randint(rows, (rows,), device=device)
        tables[:, length - 1] = torch.arange(rows, device=device)
        tables, copied = tables[parent], [cache[parent] for cache in copied]
