"""GPT-Neo: causal attention without scaling, in every other layer within a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GPTNeoConfig

from tfm import ops
from tfm.patching.fusion import Fused
from tfm.patching.huggingface.hard_coded.adapter import Adapter, Trial, rate, why_plain
from tfm.patching.huggingface.hard_coded.masks import is_causal, rules


class FusedGPTNeoAttention(Fused):
    """GPT-Neo's attention; the buffer of allowed keys that the class holds is not read."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [B, S, H · D], and the weights [B, H, Sq, Sk] if asked for."""
        reason = why_plain(attention_mask, hidden_states)
        if reason:
            return self.plainly(
                reason, hidden_states, attention_mask, layer_past, use_cache, output_attentions, **others
            )
        self.fusedly()
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        parts = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_id)
        queries, keys = query.shape[2], key.shape[2]
        # What the buffer says holds besides any mask.
        said = {"is_causal": True, "query_start": keys - queries, **rules(attention_mask, queries, keys)}
        dense = None if is_causal(attention_mask) else attention_mask
        if self.attention_type == "local" and dense is not None and queries != keys:
            # Keys after the last may be empty (static caches): then queries do not stand at the end of the buffer.
            said = {"attn_mask": _within(dense, self.config.window_size)}
        elif self.attention_type == "local":
            said["window_size"] = (self.config.window_size - 1, -1)
        elif queries == 1:
            said |= {"is_causal": False, "query_start": 0}
        found = ops.attention(
            query, key, value, dropout_p=rate(self.attn_dropout), scale=1.0, return_weights=output_attentions, **said
        )
        output, weights = found if isinstance(found, tuple) else (found, None)
        return self.resid_dropout(self.out_proj(output.transpose(1, 2).flatten(2))), weights


def _within(mask: Tensor, window: int) -> Tensor:
    """Returns a mask [B, 1, Sq, Sk] without the keys that lie `window` or more before the last of their query."""
    is_float = mask.is_floating_point()
    seen = mask > torch.finfo(mask.dtype).min / 2 if is_float else mask
    place = torch.arange(mask.shape[-1], device=mask.device)
    far = place <= (seen * place).amax(-1, keepdim=True) - window
    return mask.masked_fill(far, -torch.inf if is_float else False)


def _trials(kind: Any) -> Iterator[Trial]:
    config = GPTNeoConfig(
        hidden_size=16, num_heads=2, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=3,
        max_position_embeddings=8,
    )  # fmt: skip
    x = torch.randn(2, 6, 16)
    mask = torch.full((2, 1, 6, 6), torch.finfo(torch.float32).min).triu(1)
    mask[1, :, 1:, 0] = -2.0

    def run(module: Any) -> Tensor:
        cache = DynamicCache()
        first = module(x[:, :2], attention_mask=mask[..., :2, :2], layer_past=cache)[0]
        return torch.cat((first, module(x[:, 2:], attention_mask=mask[..., 2:, :], layer_past=cache)[0]), 1)

    for attention_type in ("global", "local"):
        yield Trial(kind(config, attention_type, 0), run)


ADAPTERS = {"GPTNeoSelfAttention": Adapter(FusedGPTNeoAttention, _trials, reads_masks=True)}
