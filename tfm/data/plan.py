"""Encoded text, and the batches of a token budget that an epoch cuts it into."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.data.batch import Batch
from tfm.data.text import ParallelText
from tfm.errors import UserError
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
    """Encode both sides; pairs with a side of more than `max_length` tokens, EOS included, are skipped and counted.

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
        source_offsets=_cumulate(torch.frombuffer(source_lengths, dtype=torch.int64)),
        target=torch.frombuffer(target, dtype=torch.int32),
        target_offsets=_cumulate(torch.frombuffer(target_lengths, dtype=torch.int64)),
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
        """Which pairs batch k holds: int64 [B]."""
        first, last = self.slices[k]
        return self.order[first:last]

    def __getitem__(self, k: int) -> Batch:
        indices = self.indices(k)
        source = _pack(self.pairs.source, self.pairs.source_offsets, indices)
        target = _pack(self.pairs.target, self.pairs.target_offsets, indices)
        target_output, target_positions = target[:2]
        target_input = target_output.roll(1).masked_fill_(target_positions == 0, BOS)
        return Batch(*source, target_input, *target)

    def __iter__(self) -> Iterator[Batch]:
        return (self[k] for k in range(len(self)))


def batches(
    pairs: EncodedPairs, batch_tokens: int, seed: int = 0, epoch: int = 0, *, shuffle: bool = True
) -> BatchPlan:
    """Plan an epoch: every pair once, in batches with sentences × longest sentence of either side ≤ `batch_tokens`.

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
    """One 64-bit seed for both, so that seed 1 of epoch 0 is not seed 0 of epoch 1."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _cumulate(lengths: Tensor) -> Tensor:
    """int64 [n] to int64 [n + 1], from 0."""
    return F.pad(lengths.cumsum(0), (1, 0))


def _pack(tokens: Tensor, offsets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens [N], positions [N], cu_seq [B + 1] and the greatest length of the sentences at `indices`."""
    first = offsets[indices]
    lengths = offsets[indices + 1] - first
    cu_seq = _cumulate(lengths)
    total = int(cu_seq[-1])
    positions = torch.arange(total) - cu_seq[:-1].repeat_interleave(lengths, output_size=total)
    packed = tokens[positions + first.repeat_interleave(lengths, output_size=total)].long()
    return packed, positions, cu_seq.int(), int(lengths.max())
