"""Models of a few thousand weights, and sentences for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfm.config import TransformerConfig
from tfm.data import Batch, BatchPlan, EncodedPairs
from tfm.model import Transformer
from tfm.tokenizer import EOS


def small_config(**changes: Any) -> TransformerConfig:
    """16 wide, 2 heads, 2 + 2 layers, 23 tokens, no dropout."""
    shape = {"vocab_size": 23, "dim": 16, "heads": 2, "ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 2}
    return TransformerConfig(**(shape | {"dropout": 0.0, "max_length": 32} | changes))


def small_model(dtype: torch.dtype = torch.float64, spread: float = 0.3, **changes: Any) -> Transformer:
    """`small_config`, in train mode; no weight is at its initial value, so that every one of them matters."""
    model = Transformer(small_config(**changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model


def batch_of(lengths: Sequence[tuple[int, int]], vocab_size: int = 23) -> Batch:
    """Random sentence pairs of these (source, target) lengths, EOS included, in this order."""
    pairs = pairs_of([(sentence(s, vocab_size), sentence(t, vocab_size)) for s, t in lengths])
    return BatchPlan(pairs, torch.arange(len(pairs)), [(0, len(pairs))])[0]


def sentence(length: int, vocab_size: int = 23) -> list[int]:
    """Random tokens, the last one EOS."""
    return [*torch.randint(EOS + 1, vocab_size, (length - 1,)).tolist(), EOS]


def pairs_of(pairs: Sequence[tuple[list[int], list[int]]]) -> EncodedPairs:
    """What `encode_parallel` makes of sentences whose tokens are these."""

    def side(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        return flat, torch.tensor([0, *map(len, rows)]).cumsum(0)

    return EncodedPairs(*side([s for s, _ in pairs]), *side([t for _, t in pairs]))


def run_model(model: Transformer, batch: Batch) -> Tensor:
    """The decoder's output [Nt, dim]."""
    return model(batch.source, batch.target_input)


def parallel_lines(count: int, seed: int = 7) -> tuple[list[str], list[str]]:
    """Distinct source lines and their translations, word by word and backwards."""
    words = {"un": "one", "deux": "two", "trois": "three", "quatre": "four", "cinq": "five", "six": "sixth"}
    draw = random.Random(seed)
    source: dict[str, str] = {}
    while len(source) < count:
        line = draw.choices(list(words), k=draw.randint(1, 6))
        source[" ".join(line)] = " ".join(words[word] for word in reversed(line))
    return list(source), list(source.values())
