"""Encoded text, and the batches of a token budget that an epoch cuts it into."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tfm.data.batch import Batch
from tfm.data.text import ParallelText
from tfm.errors import UserError
from tfm.sequences import Layout, Ragged, offsets
from tfm.tokenizer import BOS, EOS, Tokenizer

LINES_PER_ENCODING = 16_384


@dataclass(frozen=True, eq=False)
class EncodedPairs:
    """Sentence pairs as flat token ids, each sentence ended by EOS.

    Sentence i is `source[source_offsets[i] : source_offsets[i + 1]]`, and so for `target`. Tokens are int32 [N],
    offsets int64 [pairs + 1], lengths int64 [pairs], all on the CPU. `skipped` counts pairs with a side too long.
    """

    source: Tensor
    source_offsets: Tensor
    target: Tensor
    target_offsets: Tensor
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    @property
    def source_lengths(self) -> Tensor:
        return self.source_offsets.diff()

    @property
    def target_lengths(self) -> Tensor:
        return self.target_offsets.diff()


def encode_parallel(text: ParallelText, tokenizer: Tokenizer, max_length: int) -> EncodedPairs:
    """Encodes both sides; pairs with a side of more than `max_length` tokens, EOS included, are skipped and counted.

    Raises:
        UserError: no pair is short enough.
    """
    source, target = array("i"), array("i")
    source_lengths, target_lengths = array("q"), array("q")
    for first in range(0, len(text), LINES_PER_ENCODING):
        lines = slice(first, first + LINES_PER_ENCODING)
        for s, t in zip(tokenizer.encode(text.source[lines]), tokenizer.encode(text.target[lines]), strict=True):
            if max(len(s), len(t)) < max_length:
                source.extend([*s, EOS])
                target.extend([*t, EOS])
                source_lengths.append(len(s) + 1)
                target_lengths.append(len(t) + 1)
    if not source_lengths:
        raise UserError(f"none of {len(text)} pairs has at most {max_length} tokens a side, end of sentence included")
    return EncodedPairs(
        source=torch.frombuffer(source, dtype=torch.int32),
        source_offsets=offsets(torch.frombuffer(source_lengths, dtype=torch.int64), torch.int64),
        target=torch.frombuffer(target, dtype=torch.int32),
        target_offsets=offsets(torch.frombuffer(target_lengths, dtype=torch.int64), torch.int64),
        skipped=len(text) - len(source_lengths),
    )


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of one epoch, in their order. Batch k is built only when asked for, so a resumed run may start at it.

    Pairs `order[first:last]` make a batch, for each (first, last) of `slices`.
    """

    pairs: EncodedPairs
    order: Tensor
    slices: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.slices)

    def indices(self, k: int) -> Tensor:
        """Returns the numbers of the pairs that batch k holds: int64 [B]."""
        first, last = self.slices[k]
        return self.order[first:last]

    def __getitem__(self, k: int) -> Batch:
        indices = self.indices(k)
        source = _packed(self.pairs.source, self.pairs.source_offsets, indices)
        target = _packed(self.pairs.target, self.pairs.target_offsets, indices)
        shifted = target.values.roll(1).masked_fill_(target.layout.positions == 0, BOS)
        return Batch(source, Ragged(shifted, target.layout), target.values)

    def __iter__(self) -> Iterator[Batch]:
        return (self[k] for k in range(len(self)))


def batches(
    pairs: EncodedPairs, batch_tokens: int, seed: int = 0, epoch: int = 0, *, shuffle: bool = True
) -> BatchPlan:
    """Plans an epoch: every pair once, in batches with sentences × longest sentence of either side ≤ `batch_tokens`.

    The budget is that of fairseq's --max-tokens. Pairs are sorted by (source length, target length), cut, and the
    batches shuffled; `seed` and `epoch` decide that order and the order of pairs of equal lengths. A pure function of
    its arguments (for one version of torch). Without `shuffle` the batches run from short to long, always the same.

    Raises:
        UserError: the longest sentence does not fit into `batch_tokens`.
    """
    source_lengths, target_lengths = pairs.source_lengths, pairs.target_lengths
    longest = torch.maximum(source_lengths, target_lengths)
    if len(pairs) and batch_tokens < (limit := int(longest.max())):
        raise UserError(f"a batch of {batch_tokens} tokens cannot hold the longest sentence: expected at least {limit}")
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    order = torch.randperm(len(pairs), generator=generator) if shuffle else torch.arange(len(pairs))
    for lengths in (target_lengths, source_lengths):
        order = order[lengths[order].argsort(stable=True)]

    cuts = [0]
    widest = 0
    for last, length in enumerate(longest[order].tolist()):
        widest = max(widest, length)
        if (last + 1 - cuts[-1]) * widest > batch_tokens:
            cuts.append(last)
            widest = length
    if len(pairs):
        cuts.append(len(pairs))
    slices = list(pairwise(cuts))
    if shuffle:
        slices = [slices[k] for k in torch.randperm(len(slices), generator=generator).tolist()]
    return BatchPlan(pairs, order, slices)


def _mix(seed: int, epoch: int) -> int:
    """Returns one 64-bit seed for both, so that seed 1 of epoch 0 is not seed 0 of epoch 1."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _packed(tokens: Tensor, first_tokens: Tensor, indices: Tensor) -> Ragged:
    """Packs the sentences at `indices` of flat tokens; sentence i begins at `first_tokens[i]`."""
    first = first_tokens[indices]
    lengths = first_tokens[indices + 1] - first
    cu_seq = offsets(lengths)
    layout = Layout.of(cu_seq, int(lengths.max()), int(cu_seq[-1]))
    chosen = layout.positions + first.repeat_interleave(lengths, output_size=layout.rows)
    return Ragged(tokens[chosen].long(), layout)
