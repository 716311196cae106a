"""Triton's compilations while ragged batches come: one for each way in which a kernel is specialised.

Only the batch at which each compilation is first asked for is kept: so a run over fewer batches says the same of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfm import nn, ops
from tfm.data import BatchPlan
from tfm.model import Transformer
from tfm.sequences import offsets
from tools.host.launches import without_compiling
from tools.host.models import decode, ragged_pairs, small_model, training
from tools.host.sizes import HALF, HEADS, HIDDEN, WIDTH

BATCHES, MOST = 200, 20
# Tokens of a translation: the cache grows once.
DECODED = 18
# Sizes of the paper's base model.
ATTENTION_HEADS, ATTENTION_DIM = 8, 64
# By kernel, the batches at which it is compiled once more.
Compilations = dict[str, list[int]]
Work = Callable[[random.Random], None]


def kinds() -> Iterator[tuple[str, Work]]:
    """Yields, by name, the work of one ragged batch."""
    yield "attention, packed", _packed
    for name, masked in MASKS.items():
        yield f"attention, {name}", partial(_padded, masked=masked)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, dtype=HALF)
    yield "encoder layer, padding mask", partial(_layer, layer=layer)
    trained = training(small_model(layers=1), ragged_pairs([(2, 2)]))
    yield "bundled model, training", partial(_model, step=trained.steps)
    model = small_model(layers=1, max_length=DECODED).to(HALF).eval()
    yield "bundled model, loss without grad", partial(_loss, model=model)
    yield "bundled model, decoding", partial(_decoding, model=model)


def compilations(work: Work, batches: int = BATCHES) -> Compilations:
    """Returns the compilations of `work` over the first so many batches."""
    draw = random.Random(20170612)
    asked: list[tuple[str, str]] = []

    def launched(name: str, compiled: dict[str, Any]) -> None:
        asked.append((name, compiled["key"]))

    found: Compilations = {}
    known: set[tuple[str, str]] = set()
    with without_compiling(launched):
        for batch in range(batches):
            work(draw)
            for name, key in dict.fromkeys(asked):
                if (name, key) not in known:
                    found.setdefault(name, []).append(batch)
            known.update(asked)
            asked.clear()
    return dict(sorted(found.items()))


def first(found: Compilations, batches: int) -> Compilations:
    """Returns what a run over so many batches would have found of it."""
    kept = {name: [batch for batch in asked if batch < batches] for name, asked in found.items()}
    return {name: asked for name, asked in kept.items() if asked}


def _sentences(draw: random.Random, most: int) -> list[int]:
    """Draws lengths as translation has them."""
    return [max(1, min(100, round(draw.gauss(14, 8)))) for _ in range(draw.randint(most // 3, most))]


def _pairs(draw: random.Random, most: int) -> tuple[list[int], list[int]]:
    """Draws lengths of sentences and of their translations."""
    source = _sentences(draw, most)
    return source, [max(1, round(length * draw.uniform(0.7, 1.4))) for length in source]


def _backward(output: Tensor, *leaves: Tensor) -> None:
    torch.autograd.grad(output, leaves, torch.empty_like(output))


def _packed(draw: random.Random) -> None:
    source, target = _pairs(draw, 120)
    for queries, keys, is_causal in ((source, source, False), (target, target, True), (target, source, False)):
        query, key, value = (
            torch.empty(sum(lengths), ATTENTION_HEADS, ATTENTION_DIM, dtype=HALF, requires_grad=True)
            for lengths in (queries, keys, keys)
        )
        cu_seq_q, cu_seq_k = (offsets(torch.tensor(lengths)) for lengths in (queries, keys))
        output = ops.varlen_attention(
            query, key, value, cu_seq_q, cu_seq_k, max(queries), max(keys), 0.1, is_causal, seed=torch.tensor(5)
        )  # fmt: skip
        _backward(output, query, key, value)


def _bias(sentences: int, queries: int, keys: int) -> dict[str, Tensor]:
    return {"attn_mask": torch.empty(1, ATTENTION_HEADS, queries, keys, dtype=HALF, requires_grad=True)}


# The mask of a batch of (sentences, queries, keys).
MASKS: dict[str, Callable[[int, int, int], dict[str, Tensor]]] = {
    "key lengths": lambda sentences, queries, keys: {"key_lengths": torch.full((sentences,), keys, dtype=torch.int32)},
    "bool mask of padding": lambda sentences, queries, keys: {
        "attn_mask": torch.empty(sentences, 1, 1, keys, dtype=torch.bool)
    },
    "dense bool mask": lambda sentences, queries, keys: {
        "attn_mask": torch.empty(sentences, 1, queries, keys, dtype=torch.bool)
    },
    "learnt bias": _bias,
}


def _padded(draw: random.Random, masked: Callable[[int, int, int], dict[str, Tensor]]) -> None:
    sentences, source, target = draw.randint(8, 128), draw.randint(6, 100), draw.randint(6, 100)
    for queries, keys, is_causal in ((source, source, False), (target, target, True), (target, source, False)):
        query, key, value = (
            torch.empty(sentences, length, ATTENTION_HEADS, ATTENTION_DIM, dtype=HALF).transpose(1, 2).requires_grad_()
            for length in (queries, keys, keys)
        )
        mask: dict[str, Any] = masked(sentences, queries, keys)
        output = ops.attention(
            query, key, value, dropout_p=0.1, is_causal=is_causal, seed=torch.tensor(5), **mask
        )  # fmt: skip
        _backward(output, query, key, value, *(x for x in mask.values() if x.requires_grad))


def _layer(draw: random.Random, layer: nn.TransformerEncoderLayer) -> None:
    sentences, length = draw.randint(2, 16), draw.randint(6, 100)
    x = torch.empty(sentences, length, WIDTH, dtype=HALF, requires_grad=True)
    output = layer(x, src_key_padding_mask=torch.zeros(sentences, length, dtype=torch.bool))
    _backward(output, x, *layer.parameters())


def _model(draw: random.Random, step: Callable[[Any], None]) -> None:
    pairs = ragged_pairs([*zip(*_pairs(draw, 24), strict=True)])
    step(BatchPlan(pairs, torch.arange(len(pairs)), [(0, len(pairs))])[0])


def _loss(draw: random.Random, model: Transformer) -> None:
    rows = draw.randint(50, 2000)
    with torch.no_grad():
        model.loss(torch.empty(rows, WIDTH, dtype=HALF), torch.ones(rows, dtype=torch.int64), 0.1)


def _decoding(draw: random.Random, model: Transformer) -> None:
    decode(model, _sentences(draw, 24), lambda: None)
