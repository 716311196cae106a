"""Sentence pairs that are trained on together: packed end to end, padded for models that want rows, rounded up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.tokenizer import PAD

# A target that the loss does not count; torch's default.
IGNORED = -100


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

    def rounded(self, tokens: int, sentences: int = 1, length: int = 1) -> Batch:
        """The batch filled up, so that each side has a multiple of `tokens` and there is a multiple of `sentences`.

        What fills it stands behind the batch: sentences of PAD no longer than the longest, whose length is rounded up
        to a multiple of `length` before, and empty ones. Their targets are IGNORED, and no sentence sees another. So
        batches have few shapes, for libraries and graphs that prepare each.
        """
        longest = [_up(side, length) for side in (self.max_source, self.max_target)]
        total = [_up(len(side), tokens) for side in (self.source, self.target_output)]
        extra = [total[0] - len(self.source), total[1] - len(self.target_output)]
        pieces = max(-(-more // most) if most else 0 for more, most in zip(extra, longest, strict=True))
        added = _up(len(self) + pieces, sentences) - len(self)

        def longer(side: Tensor, place: int, value: int) -> Tensor:
            return F.pad(side, (0, extra[place]), value=value)

        def more(cu_seq: Tensor, place: int) -> Tensor:
            ends = torch.arange(1, added + 1, dtype=cu_seq.dtype, device=cu_seq.device) * longest[place]
            return torch.cat((cu_seq, (cu_seq[-1] + ends).clamp(max=total[place])))

        return Batch(
            longer(self.source, 0, PAD),
            longer(self.source_positions, 0, 0),
            more(self.cu_seq_source, 0),
            longest[0],
            longer(self.target_input, 1, PAD),
            longer(self.target_output, 1, IGNORED),
            longer(self.target_positions, 1, 0),
            more(self.cu_seq_target, 1),
            longest[1],
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """All that the work of a step follows from but the numbers: sentences, then each side's tokens and longest."""
        return len(self), len(self.source), self.max_source, len(self.target_output), self.max_target

    def clone(self) -> Batch:
        return self._map(Tensor.clone)

    def copy_(self, other: Batch) -> None:
        """Takes the numbers of a batch of the same shape, in place; from pinned memory the host does not wait."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value.copy_(getattr(other, name), non_blocking=True)

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


def _pad(packed: Tensor, positions: Tensor, cu_seq: Tensor, longest: int) -> Tensor:
    dense = packed.new_full((len(cu_seq) - 1, longest), PAD)
    rows = torch.arange(len(dense), device=packed.device).repeat_interleave(cu_seq.diff(), output_size=len(packed))
    dense[rows, positions] = packed
    return dense


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
