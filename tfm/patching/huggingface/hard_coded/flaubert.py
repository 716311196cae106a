"""FlauBERT and XLM: attention whose mask is of keys, or for causal models of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, FlaubertConfig

from tfm import ops
from tfm.patching.fusion import Fused, why_no_kernel
from tfm.patching.huggingface.hard_coded.adapter import Adapter, Trial


class FusedFlaubertAttention(Fused):
    """Self-attention of FlauBERT and XLM; attention to another sequence runs as before."""

    def forward(
        self,
        input: Tensor,
        mask: Tensor,
        kv: Tensor | None = None,
        cache: Any = None,
        output_attentions: bool = False,
        **others: Any,
    ) -> tuple[Tensor, ...]:
        """Returns ([B, S, H · D],), and the weights [B, H, Sq, Sk] if asked for."""
        reason = "keys and values are of another sequence" if kv is not None else why_no_kernel("attention", input)
        if reason:
            return self.plainly(reason, input, mask, kv, cache, output_attentions, **others)
        self.fusedly()
        heads = (*input.shape[:-1], self.n_heads, self.head_dim)
        parts = (self.q_lin(input), self.k_lin(input), self.v_lin(input))
        query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
        if cache is not None:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            key, value = own.update(key, value, self.layer_id)
        said: dict[str, Any] = {"key_mask": mask != 0} if mask.dim() == 2 else {"attn_mask": (mask != 0)[:, None]}
        found = ops.attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, return_weights=output_attentions,
            **said,
        )  # fmt: skip
        output, *weights = found if isinstance(found, tuple) else (found,)
        return self.out_lin(output.transpose(1, 2).flatten(2)), *weights


def _trials(kind: Any) -> Iterator[Trial]:
    config = FlaubertConfig(emb_dim=16, n_heads=2, n_layers=1)
    x = torch.randn(2, 5, 16)
    of_keys = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    causal = torch.ones(2, 5, 5).tril().bool()

    def run(module: Any) -> Tensor:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = module(x[:, :3], of_keys[:, :3], cache=cache)[0]
        return torch.cat((first, module(x[:, 3:], of_keys, cache=cache)[0], module(x, causal)[0]), 1)

    yield Trial(kind(2, 16, config, layer_idx=0), run)


ADAPTERS = {"MultiHeadAttention": Adapter(FusedFlaubertAttention, _trials)}
