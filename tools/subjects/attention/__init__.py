"""Attention: the cases that are compiled, small passes, and calls whose host time is told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfm import ops
from tfm.kernels.launch.attention.splits import LEAST_KEYS
from tools.check_kernels.case import Case
from tools.host import sizes
from tools.host.call import Budget, Call
from tools.subjects import inputs
from tools.subjects.attention.any_length import attention_cases
from tools.subjects.attention.short import score_cases, short_attention_cases
from tools.subjects.inputs import Outputs, Pass, Tensors


def compiled(every: bool) -> Iterator[Case]:
    """Yields the cases of every kernel of attention."""
    for family in (attention_cases, score_cases, short_attention_cases):
        yield from family(every)


def by_distance(new: Tensors, distances: int) -> dict[str, Any]:
    """Returns a bias of so many distances, of which csrc's kernels for GPUs, the short ones, add none."""
    return {} if new.short else {"relative_bias": new(inputs.HEADS, distances)}


def valid_keys(new: Tensors, batch: int, keys: int) -> dict[str, Any]:
    """Returns a mask of the keys to stand beside another, of which csrc's kernels for GPUs read one alone."""
    return {} if new.short else {"key_mask": new.below(2, batch, keys).bool()}


def pass_attention(new: Tensors) -> Iterator[Outputs]:
    batch, longest, lengths = len(inputs.LENGTHS), max(inputs.LENGTHS), new.integers(*inputs.LENGTHS)
    padding = {"key_lengths": lengths, "dropout_p": inputs.DROPOUT_P}
    most = inputs.SHORT if new.short else inputs.LONG
    bias = {"attn_mask": new.biases(1, inputs.HEADS, longest, longest), "sinks": new(inputs.HEADS)}
    mask = {"attn_mask": new.below(2, batch, 1, 3, most).bool()}
    # First what is known to have been compiled wrongly elsewhere: heads that fill tiles of 32 and 64 columns.
    for dim in (32, 64):
        query = new(batch, inputs.HEADS, longest, dim)
        key, value = (new(batch, inputs.KEY_HEADS, longest, dim) for _ in range(2))
        yield ops.attention(query, key, value, None, inputs.DROPOUT_P, True, enable_gqa=True, key_lengths=lengths)
    starts = {"query_start": new.integers(*range(batch)), "window_size": (-1, 60), "return_lse": True}
    for queries, keys, options in (
        (longest, longest, {"is_causal": True} | padding),
        (
            longest,
            longest,
            {"window_size": (33, -1), "return_weights": not new.short} | bias | valid_keys(new, batch, longest),
        ),
        (3, most, mask | by_distance(new, 5) | valid_keys(new, batch, most)),
        (3, most, {"scale": 1000.0} | padding),
        (
            inputs.FEW,
            inputs.FEW,
            {"attn_mask": new.below(2, batch, 1, inputs.FEW, inputs.FEW).bool(), "return_weights": not new.short}
            | starts,
        ),
        (inputs.FEW, inputs.FEW, {"attn_mask": new.below(2, batch, 1, 1, inputs.FEW).bool()}),
        (
            inputs.FEW,
            inputs.FEW,
            {"attn_mask": new.biases(1, inputs.HEADS, 1, inputs.FEW)} | valid_keys(new, batch, inputs.FEW),
        ),
        (longest, longest, by_distance(new, 9) | {"is_causal": True} | padding),
        (
            3,
            most,
            bias
            | {"attn_mask": new.biases(inputs.HEADS, 3, most)}
            | by_distance(new, 33)
            | {"return_weights": not new.short}
            | padding
            | starts,
        ),
    ):
        query = new(batch, inputs.HEADS, queries, inputs.HEAD_DIM)
        key, value = (new(batch, inputs.KEY_HEADS, keys, inputs.HEAD_DIM) for _ in range(2))
        yield ops.attention(query, key, value, enable_gqa=True, **options)
    if not new.short:
        # Heads that are slices.
        query, key, value = new(1, 2, 3, 260), new(1, 1, 40, 260), new(1, 1, 40, 300)
        added, sinks = new.biases(1, 2, 3, 40), new(inputs.HEADS)
        yield ops.attention(query, key, value, added, enable_gqa=True, sinks=sinks, return_weights=True)
        # Few queries, whose many keys programs share.
        query, sinks = new(1, 1, 3, inputs.HEAD_DIM), new(1)
        key, value = (new(1, 1, LEAST_KEYS + 5, inputs.HEAD_DIM) for _ in range(2))
        yield ops.attention(query, key, value, None, inputs.DROPOUT_P, True, query_start=LEAST_KEYS, sinks=sinks)


def pass_varlen_attention(new: Tensors) -> Iterator[Outputs]:
    total, longest = sum(inputs.LENGTHS), max(inputs.LENGTHS)
    starts = new.integers(0, *torch.tensor(inputs.LENGTHS).cumsum(0).tolist())
    for is_causal in (False, True):
        query, key, value = (new(total, inputs.HEADS, inputs.HEAD_DIM) for _ in range(3))
        offsets = starts, starts, longest, longest
        near = by_distance(new, 9) if is_causal else {}
        yield ops.varlen_attention(query, key, value, *offsets, inputs.DROPOUT_P, is_causal, **near)
    most = inputs.SHORT if new.short else inputs.LONG
    query, (key, value) = (
        new(7, inputs.HEADS, inputs.HEAD_DIM),
        (new(most + 4, inputs.HEADS, inputs.HEAD_DIM) for _ in range(2)),
    )
    starts, key_starts = new.integers(0, 1, 4, 7), new.integers(0, 3, most + 3, most + 4)
    yield ops.varlen_attention(query, key, value, starts, key_starts, 3, most)


PASSES: dict[str, Pass] = {
    "attention": pass_attention,
    "varlen_attention": pass_varlen_attention,
}


def timed(seed: Tensor) -> list[Call]:
    """Returns the calls whose launches are counted and whose host time is told."""
    budget = Budget(host=20)
    packed = tuple(sizes.leaf(sizes.TOKENS, sizes.HEADS, sizes.DIM) for _ in range(3))
    offsets = torch.arange(0, sizes.TOKENS + 1, sizes.LENGTH, dtype=torch.int32)
    found = []
    for name, is_causal in (("", False), (", causal", True)):
        call = partial(
            ops.varlen_attention, *packed, offsets, offsets, sizes.LENGTH, sizes.LENGTH, 0.1, is_causal, seed=seed
        )  # fmt: skip
        found.append(Call(f"attention, packed{name}", call, packed, budget))

    padded, long = (tuple(sizes.heads(length) for _ in range(3)) for length in (sizes.LENGTH, sizes.LONG))
    lengths = torch.full((sizes.SENTENCES,), sizes.LENGTH, dtype=torch.int32)
    row, dense = (torch.ones(sizes.SENTENCES, 1, rows, sizes.LENGTH, dtype=torch.bool) for rows in (1, sizes.LENGTH))
    rules: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
        "key lengths": (padded, {"key_lengths": lengths}),
        "bool mask of padding": (padded, {"attn_mask": row}),
        "dense bool mask": (padded, {"attn_mask": dense}),
        "learnt bias": (padded, {"attn_mask": sizes.leaf(1, sizes.HEADS, sizes.LENGTH, sizes.LENGTH)}),
        "with weights": (padded, {"return_weights": True}),
        "long, causal": (long, {"is_causal": True}),
        "long, learnt bias": (long, {"attn_mask": sizes.leaf(1, sizes.HEADS, sizes.LONG, sizes.LONG)}),
    }
    for name, (tensors, given) in rules.items():
        mask = given.get("attn_mask")
        learnt = () if mask is None or not mask.requires_grad else (mask,)
        call = partial(ops.attention, *tensors, dropout_p=0.1, seed=seed, **given)
        found.append(Call(f"attention, {name}", call, (*tensors, *learnt), budget))
    return found
