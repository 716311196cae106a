"""XLNet: attention by content, relative position and segment, of one stream or of two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import XLNetConfig

from tfm import ops
from tfm.patching.fusion import FUSION, Fused, why_no_kernel
from tfm.patching.huggingface.hard_coded.adapter import Adapter, Trial, rate


class FusedXLNetAttention(Fused):
    """XLNetRelativeAttention; the scores of positions and segments are a dense bias (Dai et al. 2019, section 3.3)."""

    def rel_attn_core(
        self,
        q_head: Tensor,
        k_head_h: Tensor,
        v_head_h: Tensor,
        k_head_r: Tensor,
        seg_mat: Tensor | None = None,
        attn_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        """Returns [Sq, B, H, D], and the weights [Sq, Sk, B, H] if asked for."""
        reason = why_no_kernel("attention", q_head)
        getattr(self, FUSION).count(reason)
        if reason:
            return self._plain_kind.rel_attn_core(  # type: ignore[attr-defined]
                self, q_head, k_head_h, v_head_h, k_head_r, seg_mat, attn_mask, output_attentions
            )
        queries, keys = q_head.shape[0], k_head_h.shape[0]
        # Scaled before the products, which are larger.
        bias = torch.einsum("ibnd,jbnd->bnij", (q_head + self.r_r_bias) * self.scale, k_head_r)
        # Row i is moved to the left by queries - i, as the class's rel_shift_bnij has it, without a copy.
        bias = bias.flatten(2)[..., queries:].unflatten(-1, (queries, -1))[..., :keys]
        if seg_mat is not None:
            segments = torch.einsum("ibnd,snd->ibns", (q_head + self.r_s_bias) * self.scale, self.seg_embed)
            bias = bias + torch.einsum("ijbs,ibns->bnij", seg_mat, segments)
        if attn_mask is not None:
            bias = bias.sub(attn_mask.permute(2, 3, 0, 1), alpha=65500 if attn_mask.dtype == torch.float16 else 1e30)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (q_head + self.r_w_bias, k_head_h, v_head_h))
        found = ops.attention(
            query, key, value, bias, rate(self.dropout), scale=self.scale, return_weights=output_attentions
        )
        if isinstance(found, tuple):
            return found[0].permute(2, 0, 1, 3), found[1].permute(2, 3, 0, 1)
        return found.permute(2, 0, 1, 3)


def _trials(kind: Any) -> Iterator[Trial]:
    config = XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16)
    queries, keys = 3, 5
    query, (key, value) = torch.randn(queries, 2, 2, 8), torch.randn(2, keys, 2, 2, 8)
    positions = torch.randn(queries + keys, 2, 2, 8)
    segments = torch.nn.functional.one_hot(torch.arange(queries * keys * 2).view(queries, keys, 2) % 3 // 2, 2).float()
    mask = torch.zeros(queries, keys, 2, 1)
    mask[1:, 0, 1] = 1.0

    def run(module: Any) -> Tensor:
        return module.rel_attn_core(query, key, value, positions, segments, mask)

    yield Trial(kind(config), run)


ADAPTERS = {"XLNetRelativeAttention": Adapter(FusedXLNetAttention, _trials)}
