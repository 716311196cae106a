"""GPT-J and CodeGen: causal attention of queries and keys that are rotated by neighbouring columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import CodeGenConfig, DynamicCache, GPTJConfig

from tfm import ops
from tfm.patching.fusion import Fused
from tfm.patching.huggingface.hard_coded.adapter import Adapter, Trial, rate, why_plain
from tfm.patching.huggingface.hard_coded.masks import rules

# CodeGen's projection holds its heads in so many parts, each with its queries, values and keys.
PARTS = 4


class FusedGPTJAttention(Fused):
    """GPT-J's attention."""

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [B, S, H · D], and the weights [B, H, Sq, Sk] if asked for."""
        reason = why_plain(attention_mask, hidden_states)
        if reason:
            return self.plainly(
                reason, hidden_states, layer_past, attention_mask, position_ids, use_cache, output_attentions, **others
            )
        self.fusedly()
        heads = (*hidden_states.shape[:-1], self.num_attention_heads, self.head_dim)
        parts = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
        table = self.embed_positions.to(position_ids.device)[position_ids].to(key.dtype)
        return _attended(self, query, key, value, table, layer_past, attention_mask, bool(output_attentions))


class FusedCodeGenAttention(Fused):
    """CodeGen's attention, whose mask is added before the scores are scaled."""

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [B, S, H · D], and the weights [B, H, Sq, Sk] if asked for."""
        reason = why_plain(attention_mask, hidden_states)
        if reason:
            return self.plainly(
                reason, hidden_states, layer_past, attention_mask, position_ids, use_cache, output_attentions, **others
            )
        self.fusedly()
        # [B, S, parts, (query, value, key), heads of a part, D]
        parts = self.qkv_proj(hidden_states).unflatten(-1, (PARTS, 3, -1, self.head_dim))
        query, value, key = (part.flatten(2, 3).transpose(1, 2) for part in parts.unbind(3))
        table = self.embed_positions.to(position_ids.device)[position_ids]
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask / self.scale_attn
        return _attended(self, query, key, value, table, layer_past, attention_mask, bool(output_attentions))


def _attended(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    cache: Any,
    mask: Tensor | None,
    with_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rotates by `table`, sines before cosines, attends and projects."""
    sin, cos = table.chunk(2, -1)
    turned: Any = ops.rotary(query, key, cos, sin, interleaved=True)
    query, key = turned
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    found = ops.attention(
        query, key, value, dropout_p=rate(module.attn_dropout), return_weights=with_weights,
        **rules(mask, query.shape[2], key.shape[2]),
    )  # fmt: skip
    output, weights = found if isinstance(found, tuple) else (found, None)
    return module.resid_dropout(module.out_proj(output.transpose(1, 2).flatten(2))), weights


def _trials(kind: Any, config: Any) -> Iterator[Trial]:
    x = torch.randn(2, 5, config.n_embd)
    mask = torch.full((2, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
    # Half of what hides a key shows where it is added.
    mask[1, :, 1:, 0] = -2.0

    def run(module: Any) -> Tensor:
        cache, place = DynamicCache(), torch.arange(3, 8)[None]
        first = module(x[:, :2], layer_past=cache, attention_mask=mask[..., :2, :2], position_ids=place[:, :2])[0]
        second = module(x[:, 2:], layer_past=cache, attention_mask=mask[..., 2:, :], position_ids=place[:, 2:])[0]
        return torch.cat((first, second), 1)

    yield Trial(kind(config, layer_idx=0), run)


def _gptj(kind: Any) -> Iterator[Trial]:
    return _trials(kind, GPTJConfig(n_embd=16, n_head=2, n_layer=1, n_positions=8, rotary_dim=4))


def _codegen(kind: Any) -> Iterator[Trial]:
    return _trials(kind, CodeGenConfig(n_embd=64, n_head=8, n_layer=1, n_positions=8, rotary_dim=4))


ADAPTERS = {
    "GPTJAttention": Adapter(FusedGPTJAttention, _gptj, reads_masks=True),
    "CodeGenAttention": Adapter(FusedCodeGenAttention, _codegen, reads_masks=True),
}
