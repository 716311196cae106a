"""The shapes that benchmarks run at, as data: sizes of a few milliseconds for CPUs, published ones for GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CUDA = torch.cuda.is_available()

# Of Multi30k's sentences in 9,712 tokens, end included: how many of a hundred have 6, 8, ... tokens.
MULTI30K_LENGTHS = {6: 1, 8: 6, 10: 15, 12: 22, 14: 19, 16: 13, 18: 9, 21: 7, 24: 4, 28: 3, 34: 1}


def draw_lengths(sentences: int, generator: torch.Generator) -> list[int]:
    """So many lengths, as Multi30k's sentences have them."""
    shares = torch.tensor(list(MULTI30K_LENGTHS.values())).float()
    drawn = torch.multinomial(shares, sentences, replacement=True, generator=generator)
    return [list(MULTI30K_LENGTHS)[k] for k in drawn.tolist()]


@dataclass(frozen=True)
class Rows:
    """Tokens of a batch by the width of the model."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Sentences:
    """A batch of sentences of Multi30k's lengths, and the heads of its attention."""

    sentences: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.sentences} sentences {self.heads}x{self.head_dim}"

    def lengths(self) -> list[int]:
        """The length of each sentence, drawn anew the same each time, in ascending order as a bucketed batch has it."""
        return sorted(draw_lengths(self.sentences, torch.Generator().manual_seed(1)))


@dataclass(frozen=True)
class Projection:
    """Tokens, the width of the model, and what it is projected to: the feed-forward network's width, the vocabulary."""

    rows: int
    columns: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.outputs}"


# The last two are those of published norm benchmarks.
GPU_NORMS = [Rows(4096, 512), Rows(16384, 1024), Rows(16384, 4096), Rows(8192, 8192)]
NORMS = GPU_NORMS if CUDA else [Rows(256, 512), Rows(1024, 512)]
EMBEDDINGS = [Rows(8192, 512), Rows(8192, 1024)] if CUDA else [Rows(1024, 512)]
ATTENTIONS = [Sentences(256, 8, 64), Sentences(512, 16, 64)] if CUDA else [Sentences(64, 4, 32), Sentences(32, 8, 64)]
FEED_FORWARDS = [Projection(8192, 512, 2048), Projection(8192, 1024, 4096)] if CUDA else [Projection(512, 512, 2048)]
VOCABULARIES = [Projection(8192, 512, 32768), Projection(8192, 1024, 32768)] if CUDA else [Projection(512, 128, 9712)]
