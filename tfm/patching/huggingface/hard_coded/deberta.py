"""DeBERTa V2 and V3: attention to contents and to relative positions, whose scores are a dense bias with gradient.

The scores between contents and positions (He et al. 2021, "DeBERTa", section 3.1, equation 4) are gathered from
products of queries and keys with the table of positions, by the class's own method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import DebertaV2Config

from tfm import ops
from tfm.patching.fusion import Fused, why_no_kernel
from tfm.patching.huggingface.hard_coded.adapter import Adapter, Trial, rate
from tfm.patching.huggingface.hard_coded.masks import rules


class FusedDebertaAttention(Fused):
    """DisentangledSelfAttention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [B, S, H · D], and the weights [B, H, Sq, Sk] if asked for."""
        reason = why_no_kernel("attention", hidden_states)
        if reason:
            return self.plainly(
                reason, hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        self.fusedly()
        heads = self.num_attention_heads
        queries = hidden_states if query_states is None else query_states
        query, key, value = (
            project(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for project, x in (
                (self.query_proj, queries), (self.key_proj, hidden_states), (self.value_proj, hidden_states),
            )
        )  # fmt: skip
        kinds = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
        said = rules(attention_mask.bool(), query.shape[2], key.shape[2])
        if self.relative_attention:
            positions = self.pos_dropout(rel_embeddings)
            bias = self.disentangled_attention_bias(
                query.flatten(0, 1), key.flatten(0, 1), relative_pos, positions, kinds
            )
            if isinstance(bias, Tensor):
                bias = bias.unflatten(0, (-1, heads))
                # A mask of queries and keys holds whatever else is added.
                mask = said.get("attn_mask")
                said["attn_mask"] = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        found = ops.attention(
            query, key, value, dropout_p=rate(self.dropout), scale=1 / math.sqrt(query.shape[-1] * kinds),
            return_weights=output_attentions, **said,
        )  # fmt: skip
        output, weights = found if isinstance(found, tuple) else (found, None)
        return output.transpose(1, 2).flatten(2), weights


class FusedDebertaEncoder(Fused):
    """DebertaV2Encoder, whose mask of padding stays one of keys: what padding attends to is nobody's business."""

    def get_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """Returns [B, 1, 1, S] for a mask of keys, or what the class makes of others."""
        if attention_mask.dim() == 2:
            return attention_mask[:, None, None, :]
        return self._plain_kind.get_attention_mask(self, attention_mask)  # type: ignore[attr-defined]


def _config(**options: Any) -> Any:
    config: Any = DebertaV2Config
    return config(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16,
        max_position_embeddings=16, relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm", **options,
    )  # fmt: skip


def _attentions(kind: Any) -> Iterator[Trial]:
    x, positions = torch.randn(2, 9, 16), torch.randn(8, 16)
    mask = torch.ones(2, 1, 9, 9)
    mask[1, :, 1:, 0] = 0

    def run(module: Any) -> Tensor:
        return module(x, mask, rel_embeddings=positions)[0]

    for options in (
        {"share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
        {"share_att_key": False, "pos_att_type": ["c2p"]},
    ):
        yield Trial(kind(_config(**options)), run)


def _encoders(kind: Any) -> Iterator[Trial]:
    x = torch.randn(2, 9, 16)
    valid = torch.ones(2, 9, dtype=torch.long)
    valid[1, 6:] = 0

    def run(module: Module) -> Tensor:
        return module(x, valid).last_hidden_state[valid.bool()]

    yield Trial(kind(_config(share_att_key=True, pos_att_type=["p2c", "c2p"])), run)


ADAPTERS = {
    "DisentangledSelfAttention": Adapter(FusedDebertaAttention, _attentions),
    "DebertaV2Encoder": Adapter(FusedDebertaEncoder, _encoders),
}
