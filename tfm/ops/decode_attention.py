"""Attention of one query a sequence over a cache of keys and values, as in decoding step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.autocast import under_autocast, without_autocast
from tfm.errors import BadArgument
from tfm.operators.calling import run
from tfm.operators.decode_attention import DecodeAttention
from tfm.ops.attention_rules import scaled
from tfm.ops.backends import choose
from tfm.ops.checks import check_numbers
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import decode_attention as reference


@door
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    parents: Tensor | None = None,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Computes softmax(scale · query keysᵀ) values, one query a row ("Attention Is All You Need", 3.2.1, equation 1).

    A row is a hypothesis. Its keys are the first places of the cache, and `parents` says of which row of the cache each
    is, so that a beam that is reordered copies a row of that table and never the cache. A row without keys gives 0, and
    what lies behind a row's length, NaN included, does not reach it.

    With `key` and `value`, those of the latest token, it stores them at place lengths - 1 of the row itself, attends to
    them there whatever `parents` says of that place, and reads no place of another row that this call writes to: an
    ancestry never leads there. Nothing is read by the host, so that a CUDA graph can hold the step.

    The caches may have any strides but that of the columns, 1: with a place's heads side by side a token's keys are
    stored as one piece, and each head of it is read in pieces of D, the same for the row's own keys and its ancestors'.

    Args:
        query: [R, H, D], floating point.
        key_cache: [R', capacity, Hkv, D]; H is any multiple of Hkv.
        value_cache: [R', capacity, Hkv, Dv].
        lengths: int32 [R], how many places each row attends to; taken as from 0 to the capacity.
        parents: int32 [R, capacity], the row of the cache for each place below a row's length; the others are not read.
            None is each row's own, and then R <= R'.
        key: [R, Hkv, D], the latest token's, with R <= R'; None where the caches hold it already.
        value: [R, Hkv, Dv]; given where `key` is.
        scale: of the scores; None is 1/sqrt(D).
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        [R, H, Dv] in the dtype of `query`, or autocast's, which must then be the caches' too.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a tensor that needs a gradient, a backend that
            cannot run.
        IndexError: on CPU, a parent outside the cache. (On a GPU torch stops the process; the Triton kernel reads
            nothing and gives NaN.)
    """
    if key is None or value is None:
        if key is not value:
            wanted = "one, as key is given" if value is None else "none, as key is None"
            raise BadArgument(f"value: expected {wanted}, got {_shape(value)}")
        (query,) = under_autocast(query)
    else:
        query, key, value = under_autocast(query, key, value)
    _check(query, key_cache, value_cache, lengths, parents, key, value)
    check_numbers(scale=scale)
    backend = choose("decode_attention", impl, value_cache if value_cache.shape[3] > query.shape[2] else query)
    query, scale = scaled(query, scale)
    call = DecodeAttention(query, key_cache, value_cache, lengths, parents, key, value, scale)
    if backend == "reference":
        with without_autocast(query.device):
            return reference.decode_attention(*call)
    return run(namespace_of(backend), call)


# Messages are formatted only where they are raised: a step of a small model takes no longer than a dozen of them.
def _check(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, parents: Tensor | None,
    key: Tensor | None, value: Tensor | None,
) -> None:  # fmt: skip
    if query.dim() != 3:
        raise BadArgument(f"query: expected [rows, heads, dim], got shape {tuple(query.shape)}")
    given = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "key": key, "value": value}
    differentiates = torch.is_grad_enabled()
    for name, tensor in given.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise BadArgument(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise BadArgument(f"{name}: expected {query.dtype} like query, got {tensor.dtype}")
        if differentiates and tensor.requires_grad:
            raise BadArgument(f"{name}: expected a tensor without gradient, or torch.no_grad(), got one that needs it")
        if tensor.device != query.device:
            raise BadArgument(f"{name}: expected a tensor on {query.device} like query, got one on {tensor.device}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4:
            raise BadArgument(f"{name}: expected [rows, capacity, heads, dim], got shape {tuple(cache.shape)}")
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            raise BadArgument(f"{name}: expected columns side by side, got strides {cache.stride()}")
    rows, heads, dim = query.shape
    cache_rows, capacity, key_heads, value_dim = value_cache.shape
    if key_heads == 0 or heads % key_heads:
        raise BadArgument(f"query: expected a multiple of value_cache's {key_heads} heads, got {heads}")
    if cache_rows < rows and (parents is None or key is not None):
        raise BadArgument(f"value_cache: expected at least the {rows} rows of query, got {cache_rows}")
    for name, tensor, shape in (
        ("key_cache", key_cache, (cache_rows, capacity, key_heads, dim)),
        ("key", key, (rows, key_heads, dim)),
        ("value", value, (rows, key_heads, value_dim)),
        ("lengths", lengths, (rows,)),
        ("parents", parents, (rows, capacity)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise BadArgument(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    for name, numbers in (("lengths", lengths), ("parents", parents)):
        if numbers is not None and numbers.dtype != torch.int32:
            raise BadArgument(f"{name}: expected int32, got {numbers.dtype}")
        if numbers is not None and numbers.device != query.device:
            raise BadArgument(f"{name}: expected a tensor on {query.device} like query, got one on {numbers.device}")


def _shape(x: Tensor | None) -> str:
    return "none" if x is None else f"shape {tuple(x.shape)}"
