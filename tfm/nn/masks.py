"""Masks of queries and keys: torch's masks turned into what the operations take, for padded and packed tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from tfm import ops
from tfm.errors import AssertedArgument, BadArgument
from tfm.sequences import Layout


@dataclass(frozen=True)
class PaddedMask:
    """The mask of attention over tokens that lie in [B, S, E] (batch_first) or [S, B, E].

    Attributes:
        batch_first: which of the two.
        attn_mask: broadcastable to [B, H, Sq, Sk], as tfm.ops.attention takes it: bool (True = attend) or added.
        is_causal: a query sees keys up to its own position.
        key_lengths: [B], how many keys of each sequence are valid.
    """

    batch_first: bool
    attn_mask: Tensor | None = None
    is_causal: bool = False
    key_lengths: Tensor | None = None

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, seed: Tensor | None, site: int
    ) -> Tensor:
        """Turns [..., H, D] query, key and value into the heads' outputs side by side, [..., H · D]."""
        return self.merge_heads(self._attend(query, key, value, dropout_p, seed, site, False))

    def attention_and_weights(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, seed: Tensor | None, site: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the same, and the softmax weights [B, H, Sq, Sk] as dropout leaves them."""
        output, weights = self._attend(query, key, value, dropout_p, seed, site, True)
        return self.merge_heads(output), weights

    def merge_heads(self, output: Tensor) -> Tensor:
        """Turns [B, H, S, D] into [B, S, H · D] or [S, B, H · D]."""
        return output.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)).flatten(-2)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        seed: Tensor | None,
        site: int,
        return_weights: bool,
    ) -> Any:
        # From [B, S, H, D] or [S, B, H, D] to [B, H, S, D].
        query, key, value = (x.permute((0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)) for x in (query, key, value))
        return ops.attention(
            query, key, value, self.attn_mask, dropout_p, self.is_causal,
            key_lengths=self.key_lengths, return_weights=return_weights, seed=seed, site=site,
        )  # fmt: skip


@dataclass(frozen=True)
class PackedMask:
    """The mask of attention over tokens that lie in [N, E], sequences end to end; `is_causal` as in `PaddedMask`."""

    queries: Layout
    keys: Layout
    is_causal: bool = False

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, seed: Tensor | None, site: int
    ) -> Tensor:
        """Turns [N, H, D] query, key and value into the heads' outputs side by side, [N, H · D]."""
        output = ops.varlen_attention(
            query, key, value, self.queries.cu_seq, self.keys.cu_seq, self.queries.max_length, self.keys.max_length,
            dropout_p, self.is_causal, seed=seed, site=site,
        )  # fmt: skip
        return output.flatten(-2)


AttentionMask = PaddedMask | PackedMask


def merge_masks(
    attn_mask: Tensor | None, padding_mask: Tensor | None, shape: tuple[int, int, int, int], batched: bool
) -> Tensor | None:
    """Returns torch's two masks as one for tfm.ops.attention.

    Args:
        attn_mask: [Sq, Sk] or [B · H, Sq, Sk]: bool (True = masked) or floating point, added to the scores.
        padding_mask: [B, Sk], likewise.
        shape: [B, H, Sq, Sk]; nothing is broadcast to it, as [4, 5, 5] might be a mask a sample or one a head.
        batched: whether the caller's tensors have a batch.

    Returns:
        Broadcastable to [B, H, Sq, Sk]: bool (True = attend) where both are bool, else floating point, added; None
        where there is neither.

    Raises:
        ValueError: a shape or dtype that torch does not take.
    """
    masks = []
    if attn_mask is not None:
        batch, heads, queries, keys = shape
        expected = (queries, keys) if attn_mask.dim() == 2 else (batch * heads, queries, keys)
        if attn_mask.shape != expected:
            words = "(queries, keys)" if attn_mask.dim() == 2 else f"({batch} batch · {heads} heads, queries, keys)"
            came = tuple(attn_mask.shape)
            error = BadArgument if batched or attn_mask.dim() == 2 else AssertedArgument
            raise error(f"attn_mask: Expected `attn_mask` shape to be {expected}, {words}, got {came}")
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(shape))
    if padding_mask is not None:
        masks.append(padding_mask[:, None, None, :])
    if not masks:
        return None
    floats = [mask.dtype for mask in masks if mask.is_floating_point()]
    if not floats:
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [as_added(mask, floats[0]) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def check_attention_mask(mask: Tensor | None) -> None:
    """Checks what torch asks of a mask even where the hint stands for it."""
    if mask is None:
        return
    check_mask_dtype(mask)
    if mask.dim() not in (2, 3):
        found = f"but found {mask.dim()}-D tensor instead"
        raise AssertedArgument(f"attn_mask: expected `attn_mask` to be `None`, 2-D or 3-D {found}")


def check_mask_dtype(mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertedArgument(f"mask: expected bool (True = masked) or floating point (added), got {mask.dtype}")


@overload
def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def as_added(mask: None, dtype: torch.dtype) -> None: ...
def as_added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a mask of torch's (bool, True = masked, or already added) in the form that is added to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    check_mask_dtype(mask)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
