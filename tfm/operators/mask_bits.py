"""Masks as bits: read once a call, for every head, tile and pass after it.

words[b, h, i, j // 32] has bit j % 32 set where query i may attend to key j by the mask alone. reach[b, h, j // 32] has
it where some query may, by the mask and the window together: a key or value that nobody reaches is read as 0, whatever
lies there, since 0 · NaN would be NaN. Of a float mask, which stays the bias that it is, reach alone is made: -inf
forbids. A mask with one row for all queries is its own reach, and needs no words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.operators.operator import Operator

# Word rows are padded to whole tiles of this many keys: no tile of keys is longer.
KEYS_OF_A_ROW = 256


def mask_to_bits(
    namespace: str, attn_mask: Tensor | None, keys: int, starts: Tensor | None, start: int, left: int | None,
    right: int | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(bias, words, reach) of a mask that broadcasts to [B, Hq, Sq, keys], or of none."""
    if attn_mask is None:
        return None, None, None
    operator = getattr(torch.ops, namespace).attention_mask_bits.default
    mask = whole_rows(attn_mask, keys)
    if mask.dtype != torch.bool:
        return mask, None, operator(mask.detach(), starts, start, left, right)[1]
    for dim in range(3):  # an expanded mask is one that broadcasts
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 and mask.shape[dim] > 1 else mask
    words, reach = operator(mask, starts, start, left, right)
    return None, words if mask.shape[2] != 1 else None, reach


def mask_of_bits(bias: Tensor | None, words: Tensor | None, reach: Tensor | None, keys: int) -> Tensor | None:
    """A mask of which these are the bits."""
    bits = words
    if bits is None and bias is None and reach is not None:
        bits = reach[:, :, None]
    if bits is None:
        return bias
    place = torch.arange(keys, device=bits.device)
    allowed = (bits[..., place // 32] >> (place % 32).int()) & 1 == 1
    return allowed if bias is None else bias.masked_fill(~allowed, float("-inf"))


def whole_rows(mask: Tensor, keys: int) -> Tensor:
    """`mask` as [B|1, Hq|1, Sq|1, keys]."""
    return mask.view(*[1] * (4 - mask.dim()), *mask.shape).expand(-1, -1, -1, keys)


def empty_bits(mask: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the operator fills. The reach of a shared mask is each sequence's own where their windows differ."""
    batch, heads, queries, keys = mask.shape
    one_row = queries == 1 or mask.stride(2) == 0
    width = -(-keys // KEYS_OF_A_ROW) * KEYS_OF_A_ROW // 32
    rows = 0 if mask.dtype != torch.bool or one_row else queries
    words = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=mask.device)
    sequences = batch if starts is None or one_row else len(starts)
    return words, torch.empty((sequences, heads, width), dtype=torch.int32, device=mask.device)


MASK_BITS = Operator(
    "attention_mask_bits(Tensor mask, Tensor? starts, SymInt start, int? left, int? right)"
    " -> (Tensor words, Tensor reach)",
    fake=lambda mask, starts, *_: empty_bits(mask, starts),
)
