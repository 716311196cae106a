"""Sentence pairs that are trained on together: packed end to end, and rounded up."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tfm.sequences import Ragged, TensorRecord
from tfm.tokenizer import PAD

# A target that the loss does not count; torch's default.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Batch(TensorRecord):
    """B sentence pairs as token ids, int64, all on one device.

    Teacher forcing: `target_input` is BOS + target, and `target_output` [N], which lies as it does, target + EOS.
    """

    source: Ragged
    target_input: Ragged
    target_output: Tensor

    def __len__(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> int:
        """Real tokens of both sides, EOS included, padding not."""
        return self.source.layout.rows + self.target_input.layout.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes that decide the work of a step: each side's sentences, longest length and tokens."""
        return *self.source.layout.shape, *self.target_input.layout.shape

    def rounded(self, tokens: int, sentences: int = 1, length: int = 1) -> Batch:
        """Fills the batch up, so that each side has a multiple of `tokens` and there is a multiple of `sentences`.

        What fills it stands behind the batch: sentences of PAD no longer than the longest, whose length is rounded up
        to a multiple of `length` before, and empty ones. Their targets are IGNORED, and no sentence sees another. So
        batches have few shapes, for libraries and graphs that prepare each.
        """
        sides = self.source, self.target_input
        longest = [_up(side.layout.max_length, length) for side in sides]
        rows = [_up(side.layout.rows, tokens) for side in sides]
        extra = [count - side.layout.rows for count, side in zip(rows, sides, strict=True)]
        pieces = max(-(-more // most) if most else 0 for more, most in zip(extra, longest, strict=True))
        count = _up(len(self) + pieces, sentences)
        source, target_input = (
            Ragged(F.pad(side.values, (0, more), value=PAD), side.layout.filled(side.layout.rows + more, count, most))
            for side, more, most in zip(sides, extra, longest, strict=True)
        )
        return Batch(source, target_input, F.pad(self.target_output, (0, extra[1]), value=IGNORED))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
