"""Lists the shapes that benchmarks run at: published ones for GPUs, of milliseconds for CPUs, tiny ones to rehearse.

Translation: hidden 512 and 1024, sentences of Multi30k's lengths, vocabularies of 10k and 32k. BERT: 128 to 512 tokens
with padding. Long: 4k to 16k. Each with the masks that matter there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks.device import CUDA, QUICK, REHEARSAL

T = TypeVar("T")

# How many of a hundred sentences of Multi30k, in 9,712 tokens, have 6, 8, ... of them, the end included.
MULTI30K_LENGTHS = {6: 1, 8: 6, 10: 15, 12: 22, 14: 19, 16: 13, 18: 9, 21: 7, 24: 4, 28: 3, 34: 1}


def draw_lengths(sentences: int, generator: torch.Generator) -> list[int]:
    """Draws so many lengths, distributed as those of Multi30k's sentences."""
    shares = torch.tensor(list(MULTI30K_LENGTHS.values())).float()
    drawn = torch.multinomial(shares, sentences, replacement=True, generator=generator)
    return [list(MULTI30K_LENGTHS)[k] for k in drawn.tolist()]


@dataclass(frozen=True)
class Norm:
    """Tokens by the width of the model, and the dropout before the residual connection."""

    rows: int
    columns: int
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}" + f" dropout {self.dropout_p}" * bool(self.dropout_p)


@dataclass(frozen=True)
class FeedForward:
    """Tokens, the width of the model, that of the network, the dropout inside it, and whether it has a gate."""

    rows: int
    columns: int
    inner: int
    dropout_p: float = 0.0
    is_gated: bool = False

    def __str__(self) -> str:
        dropout = f" dropout {self.dropout_p}" * bool(self.dropout_p)
        return f"{self.rows}x{self.columns}x{self.inner}" + " gated" * self.is_gated + dropout


@dataclass(frozen=True)
class Channels:
    """Sequences, their steps, channels, and the numbers of a channel's state where they are several."""

    batch: int
    steps: int
    channels: int
    states: int = 1

    def __str__(self) -> str:
        return f"{self.batch}x{self.steps}x{self.channels}" + f" states {self.states}" * (self.states > 1)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens, the width of the model, the classes of the loss, and its label smoothing."""

    rows: int
    columns: int
    classes: int
    label_smoothing: float = 0.0

    def __str__(self) -> str:
        smoothing = f" smoothing {self.label_smoothing}" * bool(self.label_smoothing)
        return f"{self.rows}x{self.columns}x{self.classes}" + smoothing


@dataclass(frozen=True)
class Embedding:
    """Tokens, the width of the model, the rows of its table, and the dropout of the sum."""

    rows: int
    columns: int
    vocabulary: int
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} of {self.vocabulary}" + f" dropout {self.dropout_p}" * bool(self.dropout_p)


@dataclass(frozen=True)
class Rotary:
    """Sequences whose queries and keys turn, heads and their width."""

    batch: int
    length: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length} heads {self.heads}x{self.head_dim}"


@dataclass(frozen=True)
class Decoding:
    """Hypotheses that each decode one token more behind `length` - 1, and the heads of their attention.

    Attributes:
        beam: hypotheses of a sentence, whose past is shared as far as they descend from one another.
        key_heads: None has one for each query head.
    """

    rows: int
    length: int
    heads: int
    head_dim: int
    beam: int = 1
    key_heads: int | None = None

    def __str__(self) -> str:
        grouped = f" of {self.key_heads}" if self.key_heads else ""
        return f"{self.rows}x{self.length} heads {self.heads}x{self.head_dim}{grouped} beam {self.beam}"

    def ancestry(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns int32 [rows, length], the row that decoded each token, and int64 [rows], the row that each continues.

        The parents are random, the same at each call; in the last step they are a rotation, so that none is lost.
        """
        generator = torch.Generator().manual_seed(1)
        own = torch.arange(self.rows)
        table, first = own.int()[:, None].repeat(1, self.length), own // self.beam * self.beam
        for step in range(self.length - 2):
            parent = first + torch.randint(self.beam, (self.rows,), generator=generator)
            table[:, step] = own
            table = table[parent]
        parent = first + (own + 1) % self.beam
        table[:, self.length - 2 :] = own[:, None]
        return table[parent], parent


@dataclass(frozen=True)
class Sentences:
    """A batch of sentences and the heads of its attention.

    Attributes:
        mask: "self" sees its own sentence, "causal" what came before in it, "cross" another batch's sentence.
        longest: None draws Multi30k's lengths; a number draws any from 8 to it.
    """

    sentences: int
    heads: int
    head_dim: int
    mask: str = "self"
    longest: int | None = None

    def __str__(self) -> str:
        lengths = f" of 8-{self.longest}" if self.longest else ""
        return f"{self.sentences} sentences{lengths} heads {self.heads}x{self.head_dim} {self.mask}"

    @property
    def queries(self) -> list[int]:
        """Returns the length of each sentence, the same at each call, ascending as in a bucketed batch."""
        return sorted(self._draw(seed=1))

    @property
    def keys(self) -> list[int]:
        """Returns the length of each sentence attended to; those of a cross-attention are in no order."""
        return self._draw(seed=2) if self.mask == "cross" else self.queries

    def _draw(self, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        if self.longest is None:
            return draw_lengths(self.sentences, generator)
        return torch.randint(8, self.longest + 1, (self.sentences,), generator=generator).tolist()


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length, the heads of their attention, and its mask.

    Attributes:
        mask: "none", "causal", "lengths" (a random tail of each sequence, up to half of it, is padding), or "bias"
            (T5's, one for each head, query and key, which learns).
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    mask: str

    def __str__(self) -> str:
        return f"{self.batch}x{self.length} heads {self.heads}x{self.head_dim} mask {self.mask}"

    @property
    def lengths(self) -> list[int]:
        """Returns the valid keys of each sequence, the same at each call."""
        if self.mask != "lengths":
            return [self.length] * self.batch
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.length // 2, self.length + 1, (self.batch,), generator=generator).tolist()


def sizes(gpu: Sequence[T], cpu: Sequence[T], rehearsal: Sequence[T]) -> Sequence[T]:
    """Returns the sizes of the device; in a quick run the first alone."""
    sizes = rehearsal if REHEARSAL else gpu if CUDA else cpu
    return sizes[:1] if QUICK else sizes


# The last two are those of published norm benchmarks, which know no dropout.
LAYER_NORMS = sizes(
    gpu=[Norm(4096, 512, 0.1), Norm(4096, 1024, 0.1), Norm(8192, 1024), Norm(16384, 4096), Norm(8192, 8192)],
    cpu=[Norm(1920, 128, 0.3), Norm(512, 512, 0.1), Norm(512, 512)],
    rehearsal=[Norm(6, 32, 0.1), Norm(6, 32)],
)
RMS_NORMS = sizes(
    gpu=[Norm(4096, 1024, 0.1), Norm(16384, 4096)],
    cpu=[Norm(512, 512, 0.1)],
    rehearsal=[Norm(6, 32)],
)
FEED_FORWARDS = sizes(
    gpu=[FeedForward(8192, 512, 2048, 0.1), FeedForward(8192, 1024, 4096, 0.1)],
    cpu=[FeedForward(1920, 128, 256), FeedForward(512, 512, 2048, 0.1)],
    rehearsal=[FeedForward(6, 32, 48)],
)
# Two thirds of four times the width: as many weights as the plain network has.
GATED_FEED_FORWARDS = sizes(
    gpu=[FeedForward(8192, 512, 1408, 0.1, is_gated=True), FeedForward(8192, 1024, 2816, is_gated=True)],
    cpu=[FeedForward(512, 512, 1408, is_gated=True)],
    rehearsal=[FeedForward(6, 32, 48, is_gated=True)],
)
VOCABULARIES = sizes(
    gpu=[
        Vocabulary(8192, 512, 32768, 0.1),
        Vocabulary(8192, 1024, 32768, 0.1),
        Vocabulary(8192, 1024, 32768),
        Vocabulary(8192, 512, 10000, 0.1),
    ],
    cpu=[Vocabulary(512, 128, 9712, 0.1)],
    rehearsal=[Vocabulary(6, 32, 50, 0.1)],
)
EMBEDDINGS = sizes(
    gpu=[Embedding(8192, 512, 10000, 0.1), Embedding(8192, 1024, 32768, 0.1)],
    cpu=[Embedding(1920, 128, 9712, 0.3), Embedding(1024, 512, 9712, 0.1)],
    rehearsal=[Embedding(6, 32, 50)],
)
ROTARIES = sizes(
    gpu=[Rotary(64, 128, 8, 64), Rotary(4, 4096, 16, 128)],
    cpu=[Rotary(8, 64, 8, 64)],
    rehearsal=[Rotary(2, 3, 2, 16)],
)
# The second is a step of 512 sentences with a beam of 4; the third and fourth FlashAttention-3's published ones.
DECODINGS = sizes(
    gpu=[
        Decoding(256, 30, 8, 64),
        Decoding(2048, 30, 8, 64, beam=4),
        Decoding(16, 2000, 32, 128),
        Decoding(16, 4000, 32, 128),
        Decoding(16, 4000, 32, 128, key_heads=8),
    ],
    cpu=[Decoding(500, 15, 4, 32, beam=5), Decoding(78, 15, 4, 32), Decoding(80, 30, 8, 64, beam=5)],
    rehearsal=[Decoding(4, 5, 2, 16, beam=2), Decoding(2, 3, 2, 16, key_heads=1)],
)
SENTENCES = sizes(
    gpu=[
        Sentences(256, 8, 64),
        Sentences(256, 8, 64, "causal"),
        Sentences(256, 8, 64, "cross"),
        Sentences(64, 8, 64, longest=64),
        Sentences(512, 16, 64, longest=64),
    ],
    cpu=[Sentences(78, 4, 32), Sentences(78, 4, 32, "causal"), Sentences(78, 4, 32, "cross"), Sentences(32, 8, 64)],
    rehearsal=[Sentences(2, 2, 16), Sentences(2, 2, 16, "cross")],
)
BERT = [Sequences(256, 128, 12, 64, "lengths"), Sequences(128, 256, 12, 64, "lengths")]
BERT += [Sequences(64, 512, 12, 64, "lengths")]
T5 = [Sequences(32, 512, 8, 64, "bias")]
# A hidden width of 2,048 and 16k tokens, as flash-attention's papers have them.
LONG = [
    Sequences(16384 // length, length, 2048 // head_dim, head_dim, mask)
    for head_dim in (64, 128)
    for length in (4096, 16384)
    for mask in ("none", "causal")
]
SEQUENCES = sizes(
    gpu=[*BERT, *T5, *LONG],
    cpu=[Sequences(8, 128, 8, 64, "lengths"), Sequences(4, 128, 8, 64, "bias")],
    rehearsal=[Sequences(2, 16, 2, 16, mask) for mask in ("lengths", "bias", "causal")],
)
# FlexAttention compiles three kernels a size: one size of each mask.
FLEX_AT = [BERT[-1], *T5, Sequences(4, 4096, 16, 128, "causal"), Sentences(256, 8, 64)]
if REHEARSAL:
    FLEX_AT = [*SEQUENCES, SENTENCES[0]]
