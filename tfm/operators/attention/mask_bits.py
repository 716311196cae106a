"""Masks as bits: read once a call, for every head, tile and pass after it.

words[b, h, i, j // 32] has bit j % 32 set where query i may attend to key j by the mask alone. reach[b, h, j // 32] has
it where some query may, by the mask and the window together: a key or value that nobody reaches is read as 0, whatever
lies there, since 0 · NaN would be NaN. A float mask stays the bias that it is and only gets a reach: -inf forbids. A
mask with one row for all queries is its own reach, and needs no words. A key_mask is read as it is: no kernel reads
more than a byte of it where it reads a key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.operators.calling import run
from tfm.operators.declaration import Length, operator
from tfm.taping import computed

# Word rows are padded to whole tiles of this many keys: no tile of keys is longer.
KEYS_OF_A_ROW = 256


@operator("attention")
class AttentionMaskBits(NamedTuple):
    """The words and the reach of a mask.

    Attributes:
        mask: [B|1, Hq|1, Sq|1, Sk], bool or float; any strides.
        starts: as in Attention, and the rest as well.
    """

    mask: Tensor
    starts: Tensor | None
    start: Length
    left: int | None
    right: int | None

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Returns empty (words, reach): words may have no rows; each sequence with a start has a reach."""
        mask = self.mask
        batch, heads, queries, keys = mask.shape
        width = -(-keys // KEYS_OF_A_ROW) * KEYS_OF_A_ROW // 32
        rows = 0 if mask.dtype != torch.bool or self.has_one_row else queries
        words = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=mask.device)
        sequences = batch if self.starts is None or self.has_one_row else len(self.starts)
        return words, torch.empty((sequences, heads, width), dtype=torch.int32, device=mask.device)

    @property
    def has_one_row(self) -> bool:
        """True where all queries share a row."""
        return self.mask.shape[2] == 1 or self.mask.stride(2) == 0


def mask_to_bits(
    namespace: str, attn_mask: Tensor | None, keys: int, starts: Tensor | None, start: int, left: int | None,
    right: int | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns (bias, words, reach) of a mask that broadcasts to [B, Hq, Sq, keys], or of none."""
    if attn_mask is None:
        return None, None, None
    mask = computed(whole_rows, attn_mask, keys)
    if mask.dtype != torch.bool:
        values = computed(Tensor.detach, mask)
        return mask, None, run(namespace, AttentionMaskBits(values, starts, start, left, right))[1]
    mask = computed(narrowed, mask)
    words, reach = run(namespace, AttentionMaskBits(mask, starts, start, left, right))
    return None, words if mask.shape[2] != 1 else None, reach


def mask_of_bits(bias: Tensor | None, words: Tensor | None, reach: Tensor | None, keys: int) -> Tensor | None:
    """Returns a mask of which these are the bits."""
    bits = words
    if bits is None and bias is None and reach is not None:
        bits = reach[:, :, None]
    if bits is None:
        return bias
    place = torch.arange(keys, device=bits.device)
    allowed = (bits[..., place // 32] >> (place % 32).int()) & 1 == 1
    return allowed if bias is None else bias.masked_fill(~allowed, float("-inf"))


def whole_rows(mask: Tensor, keys: int) -> Tensor:
    """Returns `mask` as [B|1, Hq|1, Sq|1, keys]."""
    if mask.dim() == 4 and mask.shape[3] == keys:
        return mask
    return mask.view(*[1] * (4 - mask.dim()), *mask.shape).expand(-1, -1, -1, keys)


def narrowed(mask: Tensor) -> Tensor:
    """Returns an expanded mask as one that broadcasts."""
    for dim in range(3):
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 and mask.shape[dim] > 1 else mask
    return mask


def aligned(attn_mask: Tensor, keys: int) -> Tensor:
    """Returns a float mask with rows that begin at multiples of 16 elements, copied where they do not; others as given.

    Else Triton's kernels load each element alone, by an address of its own, and these fill the registers.
    """
    if attn_mask.dtype == torch.bool:
        return attn_mask
    bias = whole_rows(attn_mask, keys)
    rows_fit = all(step % 16 == 0 for step, size in zip(bias.stride()[:3], bias.shape[:3], strict=True) if size > 1)
    return bias if bias.stride(3) == 1 and rows_fit else F.pad(bias, (0, -keys % 16))[..., :keys]
