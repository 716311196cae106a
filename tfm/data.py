"""Parallel text: reading and checking it, and cutting it into packed batches of a token budget."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import os
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.errors import UserError
from tfm.tokenizer import BOS, EOS, PAD, Tokenizer

LINES_PER_ENCODING = 16_384


# A target that the loss does not count; torch's default.
IGNORED = -100


@dataclass(frozen=True)
class ParallelText:
    """Line i of `target` translates line i of `source`. `dropped` counts pairs left out because a side was blank."""

    source: list[str]
    target: list[str]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.source)


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


class PaddedBatch(NamedTuple):
    """int64 [B, S], [B, T] and [B, T], filled up with PAD at the end of each row."""

    source: Tensor
    target_input: Tensor
    target_output: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """B sentence pairs, packed without padding: each side is one row of tokens, sentence after sentence.

    Sentence b of a side is `cu_seq[b]` to `cu_seq[b + 1]`, as in `torch.nn.attention.varlen`. Tokens and positions
    (a token's place in its sentence, from 0) are int64 [N], `cu_seq_*` int32 [B + 1], all on one device; `max_*` is the
    longest sentence. Teacher forcing: `target_input` is BOS + target, `target_output` target + EOS.
    """

    source: Tensor
    source_positions: Tensor
    cu_seq_source: Tensor
    max_source: int
    target_input: Tensor
    target_output: Tensor
    target_positions: Tensor
    cu_seq_target: Tensor
    max_target: int

    def __len__(self) -> int:
        return len(self.cu_seq_source) - 1

    @property
    def tokens(self) -> int:
        """Real tokens of both sides, EOS included, padding not."""
        return len(self.source) + len(self.target_output)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, which `to(..., non_blocking=True)` needs to run beside the host."""
        return self._map(Tensor.pin_memory)

    def rounded(self, multiple: int) -> Batch:
        """The batch with one more sentence of padding, so that each side has a multiple of so many tokens.

        Its targets are IGNORED; it sees itself alone, and no sentence sees it. For libraries that prepare their
        matmuls anew for each number of rows.
        """
        extra = [-len(side) % multiple for side in (self.source, self.target_output)]
        if extra == [0, 0]:
            return self

        def longer(side: Tensor, place: int, value: int) -> Tensor:
            return F.pad(side, (0, extra[place]), value=value)

        def more(cu_seq: Tensor, place: int) -> Tensor:
            return torch.cat((cu_seq, cu_seq[-1:] + extra[place]))

        return Batch(
            longer(self.source, 0, PAD),
            longer(self.source_positions, 0, 0),
            more(self.cu_seq_source, 0),
            max(self.max_source, extra[0]),
            longer(self.target_input, 1, PAD),
            longer(self.target_output, 1, IGNORED),
            longer(self.target_positions, 1, 0),
            more(self.cu_seq_target, 1),
            max(self.max_target, extra[1]),
        )

    def padded(self) -> PaddedBatch:
        """The same batch with one row a sentence, for models that do not take packed input."""
        target = (self.target_positions, self.cu_seq_target, self.max_target)
        return PaddedBatch(
            source=_pad(self.source, self.source_positions, self.cu_seq_source, self.max_source),
            target_input=_pad(self.target_input, *target),
            target_output=_pad(self.target_output, *target),
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        moved: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


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


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file, plain or gzip (told by its first bytes, whatever its name).

    Raises:
        UserError: the file is missing, empty, unreadable, damaged, or not UTF-8.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a directory, expected a text file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or damaged gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines = split_lines(data, str(path))
    if not lines:
        raise UserError(f"{path}: empty, expected at least one line")
    return lines


def split_lines(data: bytes, name: str, first_line: int = 1) -> list[str]:
    r"""The lines of UTF-8 bytes, split at "\n" only; a "\r" before it and a byte order mark are dropped.

    Other characters that Unicode calls line breaks are text: splitting at them would shift one side against the other.
    `first_line` is the number of the first, where `data` is a piece of a text.

    Raises:
        UserError: a byte that is not UTF-8, with `name`, its line and its column in characters, both from 1.
    """
    if first_line == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + first_line
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8")) + 1
        raise UserError(f"{name}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x} at column {column})") from None
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_parallel(source_path: str | os.PathLike[str], target_path: str | os.PathLike[str]) -> ParallelText:
    """Read two files of parallel lines; pairs with a blank side are dropped and counted.

    Raises:
        UserError: as `read_lines`; the files differ in their number of lines; no pair is left.
    """
    source, target = read_lines(source_path), read_lines(target_path)
    if len(source) != len(target):
        raise UserError(
            f"{source_path} has {len(source)} lines but {target_path} has {len(target)}: "
            "expected as many, line i of one translating line i of the other"
        )
    kept = [(s, t) for s, t in zip(source, target, strict=True) if s.strip() and t.strip()]
    if not kept:
        raise UserError(f"{source_path} and {target_path}: in every pair of lines a side is blank")
    return ParallelText([s for s, _ in kept], [t for _, t in kept], dropped=len(source) - len(kept))


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
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _pack(tokens: Tensor, offsets: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens [N], positions [N], cu_seq [B + 1] and the greatest length of the sentences at `indices`."""
    first = offsets[indices]
    lengths = offsets[indices + 1] - first
    cu_seq = _cumulate(lengths)
    total = int(cu_seq[-1])
    positions = torch.arange(total) - cu_seq[:-1].repeat_interleave(lengths, output_size=total)
    packed = tokens[positions + first.repeat_interleave(lengths, output_size=total)].long()
    return packed, positions, cu_seq.int(), int(lengths.max())


def _pad(packed: Tensor, positions: Tensor, cu_seq: Tensor, longest: int) -> Tensor:
    dense = packed.new_full((len(cu_seq) - 1, longest), PAD)
    rows = torch.arange(len(dense), device=packed.device).repeat_interleave(cu_seq.diff(), output_size=len(packed))
    dense[rows, positions] = packed
    return dense
