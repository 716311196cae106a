"""Longformer: attention within a window, to some tokens from everywhere, and of those to everywhere.

Never dense: two softmaxes, over the window and over the global tokens, become one by their denominators (Beltagy et al.
2020, "Longformer", section 3.1). The global tokens' own rows have projections of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LongformerConfig

from tfm import ops
from tfm.patching.fusion import Fused, why_no_kernel
from tfm.patching.huggingface.hard_coded.adapter import Adapter, Trial

# Denominators of no keys at all are this at least, so that the difference of two is a number.
NOTHING = -1e30


class FusedLongformerAttention(Fused):
    """LongformerSelfAttention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        is_index_masked: Tensor,
        is_index_global_attn: Tensor,
        is_global_attn: bool,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """Returns ([B, S, H · D],).

        Args:
            hidden_states: [B, S, C].
            attention_mask: [B, S], 0 where a token attends and is attended to within the window.
            is_index_masked: [B, S], True for padding.
            is_index_global_attn: [B, S], True for global tokens.
            is_global_attn: whether there are any.
            output_attentions: whether the weights are asked for, which the class returns by their place in the window.
        """
        reason = "weights by their place in the window are asked for" if output_attentions else ""
        reason = reason or why_no_kernel("attention", hidden_states)
        if reason:
            return self.plainly(
                reason, hidden_states, attention_mask, is_index_masked, is_index_global_attn, is_global_attn,
                output_attentions,
            )  # fmt: skip
        self.fusedly()
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        window, dropout_p = self.one_sided_attn_window_size, self.dropout if self.training else 0.0
        near: dict[str, Any] = {"window_size": (window, window), "key_mask": attention_mask == 0}
        if not is_global_attn:
            output = ops.attention(query, key, value, dropout_p=dropout_p, **near)
            return (_without_padding(output, is_index_masked),)
        index, is_there = _places(is_index_global_attn)
        of_heads = index[:, None, :, None].expand(-1, self.num_heads, -1, self.head_dim)
        output = _joined(
            ops.attention(query, key, value, dropout_p=dropout_p, return_lse=True, **near),
            ops.attention(
                query, key.gather(2, of_heads), value.gather(2, of_heads), dropout_p=dropout_p, key_mask=is_there,
                return_lse=True,
            ),
        )  # fmt: skip
        output = _without_padding(output, is_index_masked)
        of_rows = index[:, :, None].expand(-1, -1, hidden_states.shape[-1])
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project, x in (
                (self.query_global, hidden_states.gather(1, of_rows)), (self.key_global, hidden_states),
                (self.value_global, hidden_states),
            )
        )  # fmt: skip
        rows = ops.attention(query, key, value, dropout_p=dropout_p, key_mask=~is_index_masked)
        rows = rows.transpose(1, 2).flatten(2).to(output.dtype)
        of_rows = of_rows[..., :1].expand_as(rows)
        return (output.scatter(1, of_rows, torch.where(is_there[..., None], rows, output.gather(1, of_rows))),)


def _places(is_global: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the places [B, G] of the global tokens, those of a sequence with fewer filled up, and which are meant."""
    most = int(is_global.sum(1).max())
    index = is_global.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, is_global.gather(1, index)


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Returns attention to the keys of both, from each one's result and the logarithm of its denominator."""
    share = torch.sigmoid(first[1].clamp_min(NOTHING) - second[1].clamp_min(NOTHING))[..., None].to(first[0].dtype)
    return share * first[0] + (1 - share) * second[0]


def _without_padding(output: Tensor, is_masked: Tensor) -> Tensor:
    """Returns [B, S, H · D] with zeros for padding."""
    return output.transpose(1, 2).flatten(2).masked_fill(is_masked[..., None], 0.0)


def _trials(kind: Any) -> Iterator[Trial]:
    config = LongformerConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, attention_window=[4])
    x = torch.randn(2, 12, 16)
    mask = torch.zeros(2, 12)
    mask[1, 9:] = -1.0
    with_global = mask.clone()
    with_global[0, 0], with_global[0, 7], with_global[1, 3] = 1.0, 1.0, 1.0

    def run(module: Any) -> Tensor:
        calls = (module(x, given, given < 0, given > 0, bool((given > 0).any()))[0] for given in (mask, with_global))
        return torch.cat(list(calls))

    yield Trial(kind(config, 0), run)


ADAPTERS = {"LongformerSelfAttention": Adapter(FusedLongformerAttention, _trials)}
