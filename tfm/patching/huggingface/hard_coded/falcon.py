"""Falcon: causal attention in three layouts of heads, by rotated queries and keys or with ALiBi."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, FalconConfig

from tfm import ops
from tfm.patching.fusion import Fused
from tfm.patching.huggingface.hard_coded.adapter import Adapter, Trial, rate, why_plain
from tfm.patching.huggingface.hard_coded.masks import is_causal, rules


class FusedFalconAttention(Fused):
    """Falcon's attention, as its class computes it with torch's own function.

    Keys and values shared by a group of heads stay shared, in the cache too, where the class writes them out.
    """

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Any = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [B, S, H · D], and the weights [B, H, Sq, Sk] if asked for."""
        reason = "no mask says what is causal" if attention_mask is None else why_plain(attention_mask, hidden_states)
        if reason:
            return self.plainly(
                reason, hidden_states, alibi, attention_mask, position_ids, layer_past, use_cache, output_attentions,
                position_embeddings, **others,
            )  # fmt: skip
        self.fusedly()
        query, key, value = _heads(self, self.query_key_value(hidden_states))
        if alibi is None:
            cos, sin = position_embeddings
            half = cos.shape[-1] // 2
            turned: Any = ops.rotary(query, key, cos[..., :half], sin[..., :half])
            query, key = turned
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        said = rules(attention_mask, query.shape[2], key.shape[2])
        if alibi is not None and is_causal(attention_mask):
            # A dense mask holds it already. It is rounded to 16 bits, so that it is taken as it comes.
            said["attn_mask"] = alibi.view(query.shape[0], self.num_heads, 1, -1) / math.sqrt(self.head_dim)
        dropout_p = rate(self.attention_dropout) if alibi is not None else 0.0
        found = ops.attention(query, key, value, dropout_p=dropout_p, return_weights=output_attentions, **said)
        output, weights = found if isinstance(found, tuple) else (found, None)
        return self.dense(output.transpose(1, 2).flatten(2)), weights


def _heads(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries [B, H, S, D], keys and values [B, H or fewer, S, D]."""
    if module.new_decoder_architecture:
        # Each group has its queries, then a key, then a value.
        groups = fused.unflatten(-1, (module.num_kv_heads, -1, module.head_dim))
        query, key, value = groups[:, :, :, :-2].flatten(2, 3), groups[:, :, :, -2], groups[:, :, :, -1]
    elif module.multi_query:
        heads = fused.unflatten(-1, (-1, module.head_dim))
        query, key, value = heads[:, :, :-2], heads[:, :, -2:-1], heads[:, :, -1:]
    else:
        query, key, value = fused.unflatten(-1, (module.num_heads, 3, module.head_dim)).unbind(3)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _why_left(module: Any) -> str:
    is_eager = module.config._attn_implementation != "sdpa"
    return "its eager attention adds ALiBi twice" if module.config.alibi and is_eager else ""


LAYOUTS = (
    {"new_decoder_architecture": True, "num_kv_heads": 2},
    {"multi_query": True},
    {"multi_query": False},
)


def _trials(kind: Any) -> Iterator[Trial]:
    x = torch.randn(2, 5, 16)
    mask = torch.full((2, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
    mask[1, :, 1:, 0] = -2.0
    angles = torch.arange(20.0).view(1, 5, 4) / 3
    halves = angles[..., :2].tile(2)
    tables = halves.cos(), halves.sin()

    def run(module: Any, alibi: Tensor | None = None) -> Tensor:
        cache = DynamicCache()
        found = [
            module(
                x[:, a:b], alibi, mask[..., a:b, :b], layer_past=cache,
                position_embeddings=tuple(table[:, a:b] for table in tables),
            )[0]
            for a, b in ((0, 2), (2, 5))
        ]  # fmt: skip
        return torch.cat(found, 1)

    def run_with_alibi(module: Any) -> Tensor:
        return run(module, torch.zeros(2, 4, 1, 5))

    for layout in LAYOUTS:
        for alibi, runs in ((False, run), (True, run_with_alibi)):
            config = FalconConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=1, alibi=alibi, **layout)
            config._attn_implementation = "sdpa"
            yield Trial(kind(config, layer_idx=0), runs)


ADAPTERS = {"FalconAttention": Adapter(FusedFalconAttention, _trials, reads_masks=True, why_left=_why_left)}
