"""A small call of every operation of tfm.ops, as a GPU would be given it: bf16, dropout where a model has it.

The sizes are of no account to the host; arithmetic that torch does on the CPU is as little as can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfm import ops

HALF = torch.bfloat16
SENTENCES, LENGTH, HEADS, DIM = 2, 8, 2, 64
TOKENS = SENTENCES * LENGTH
WIDTH, HIDDEN, CLASSES = 64, 128, 96
# More keys than those kernels take that hold all of them on chip.
LONG = 300


@dataclass(frozen=True)
class Budget:
    """What a row may take at most: launches, and the host's time as a multiple of torch.add; None for no limit."""

    launches: int | None = None
    host: float | None = None


NONE = Budget()


@dataclass(frozen=True)
class Case:
    """`call()` is the forward; `leaves` are what its backward gives gradients of, none where there is no backward.

    `forward` is the budget with gradients to come, `backward` that of the backward alone.
    """

    name: str
    call: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    forward: Budget = NONE
    backward: Budget = NONE


def operation_cases() -> list[Case]:
    """In the order of tfm.ops' own table of backends."""
    seed = torch.tensor(5)
    return [
        *_attention_cases(seed),
        *_decode_cases(),
        *_embedding_cases(seed),
        *_feed_forward_cases(seed),
        *_loss_cases(),
        *_norm_cases(seed),
        *_rotary_cases(),
    ]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=HALF).requires_grad_()


def _heads(length: int) -> Tensor:
    """[B, H, S, D] as a projection has it: heads side by side in their rows."""
    return torch.randn(SENTENCES, length, HEADS, DIM, dtype=HALF).transpose(1, 2).requires_grad_()


def _attention_cases(seed: Tensor) -> list[Case]:
    budget = Budget(host=20)
    packed = tuple(leaf(TOKENS, HEADS, DIM) for _ in range(3))
    offsets = torch.arange(0, TOKENS + 1, LENGTH, dtype=torch.int32)
    found = []
    for name, is_causal in (("", False), (", causal", True)):
        call = partial(
            ops.varlen_attention, *packed, offsets, offsets, LENGTH, LENGTH, 0.1, is_causal, seed=seed
        )  # fmt: skip
        found.append(Case(f"attention, packed{name}", call, packed, budget))

    padded, long = (tuple(_heads(length) for _ in range(3)) for length in (LENGTH, LONG))
    lengths = torch.full((SENTENCES,), LENGTH, dtype=torch.int32)
    row, dense = (torch.ones(SENTENCES, 1, rows, LENGTH, dtype=torch.bool) for rows in (1, LENGTH))
    rules: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
        "key lengths": (padded, {"key_lengths": lengths}),
        "bool mask of padding": (padded, {"attn_mask": row}),
        "dense bool mask": (padded, {"attn_mask": dense}),
        "learnt bias": (padded, {"attn_mask": leaf(1, HEADS, LENGTH, LENGTH)}),
        "with weights": (padded, {"return_weights": True}),
        "long, causal": (long, {"is_causal": True}),
        "long, learnt bias": (long, {"attn_mask": leaf(1, HEADS, LONG, LONG)}),
    }
    for name, (tensors, given) in rules.items():
        mask = given.get("attn_mask")
        learnt = () if mask is None or not mask.requires_grad else (mask,)
        call = partial(ops.attention, *tensors, dropout_p=0.1, seed=seed, **given)
        found.append(Case(f"attention, {name}", call, (*tensors, *learnt), budget))
    return found


def _decode_cases() -> list[Case]:
    found = []
    for name, capacity in (("", 32), (", long cache", 4096)):
        query, key, value = (torch.randn(SENTENCES, HEADS, DIM, dtype=HALF) for _ in range(3))
        keys, values = (torch.empty(SENTENCES, capacity, HEADS, DIM, dtype=HALF) for _ in range(2))
        lengths = torch.full((SENTENCES,), 5, dtype=torch.int32)
        parents = torch.zeros(SENTENCES, capacity, dtype=torch.int32)
        call = partial(ops.decode_attention, query, keys, values, lengths, parents, key=key, value=value)
        found.append(Case(f"decode_attention{name}", call))
    return found


def _embedding_cases(seed: Tensor) -> list[Case]:
    tokens, positions = torch.randint(0, CLASSES, (TOKENS,)), torch.arange(TOKENS)
    weight, learnt = leaf(CLASSES, WIDTH), leaf(TOKENS, WIDTH)
    call = partial(ops.embedding, tokens, weight, positions, scale=8.0, dropout_p=0.1, seed=seed)
    return [
        Case("embedding", call, (weight,)),
        Case("embedding, learnt positions", partial(call, position_weight=learnt), (weight, learnt)),
    ]


def _feed_forward_cases(seed: Tensor) -> list[Case]:
    budget = Budget(host=25)
    x, w1, b1 = leaf(TOKENS, WIDTH), leaf(HIDDEN, WIDTH), leaf(HIDDEN)
    gate, up, w2 = leaf(HIDDEN, WIDTH), leaf(HIDDEN, WIDTH), leaf(WIDTH, HIDDEN)
    found = []
    for activation in ("relu", "gelu"):
        call = partial(ops.feed_forward, x, w1, b1, w2, None, activation, 0.1, seed=seed)
        found.append(Case(f"feed_forward, {activation}", call, (x, w1, b1, w2), budget))
    call = partial(ops.gated_feed_forward, x, gate, up, w2, "silu", 0.1, seed=seed)
    return [*found, Case("gated_feed_forward, silu", call, (x, gate, up, w2), budget)]


def _loss_cases() -> list[Case]:
    x, weight, target = leaf(TOKENS, WIDTH), leaf(CLASSES, WIDTH), torch.randint(0, CLASSES, (TOKENS,))
    call = partial(ops.linear_cross_entropy, x, weight, target, label_smoothing=0.1)
    return [
        Case(f"linear_cross_entropy, {reduction}", partial(call, reduction=reduction), (x, weight))
        for reduction in ("mean", "none")
    ]


def _norm_cases(seed: Tensor) -> list[Case]:
    budget = Budget(host=16)
    x, residual = leaf(TOKENS, WIDTH), leaf(TOKENS, WIDTH)
    weight, bias, x_bias = leaf(WIDTH), leaf(WIDTH), leaf(WIDTH)
    drop: dict[str, Any] = {"dropout_p": 0.1, "seed": seed}
    added = partial(ops.residual_layer_norm, x, residual, weight, bias, x_bias=x_bias, **drop)
    added_rms = partial(ops.residual_rms_norm, x, residual, weight, **drop)
    return [
        Case("layer_norm", partial(ops.layer_norm, x, weight, bias), (x, weight, bias), budget),
        Case("residual_layer_norm", added, (x, residual, weight, bias, x_bias), budget),
        Case("residual_rms_norm", added_rms, (x, residual, weight), budget),
        Case("rms_norm", partial(ops.rms_norm, x, weight), (x, weight), budget),
    ]


def _rotary_cases() -> list[Case]:
    query, key, positions = _heads(LENGTH), _heads(LENGTH), torch.arange(LENGTH)
    cos, sin = ops.rotary_table(LENGTH, DIM)
    in_place = partial(ops.rotary_, query.detach(), HEADS, cos, sin, positions)
    return [
        Case("rotary", partial(ops.rotary, query, key, cos, sin, positions), (query, key)),
        Case("rotary_", in_place),
    ]
