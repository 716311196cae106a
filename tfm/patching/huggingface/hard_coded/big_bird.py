"""BigBird: full attention, block-sparse attention as a dense bias, and the change from one to the other.

In block-sparse attention (Zaheer et al. 2020, "Big Bird", section 2) a block of keys that is drawn at random although
it is attended to anyway counts once more in the softmax, which is the logarithm of the count added to its scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BigBirdConfig, DynamicCache

from tfm import ops
from tfm.patching.fusion import FUSION, Fused, fuse, fusion_of, why_no_kernel
from tfm.patching.huggingface.attention import wants_weights
from tfm.patching.huggingface.hard_coded.adapter import Adapter, Trial, rate, why_left, why_plain
from tfm.patching.huggingface.hard_coded.masks import rules

# Lengths whose random blocks are drawn as for the longest sequence, and cut.
CUT = (1024, 3072, 4096)


class FusedFullAttention(Fused):
    """BigBirdSelfAttention, which is BERT's."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [B, S, H · D], and the weights [B, H, Sq, Sk] if asked for."""
        crosses = encoder_hidden_states is not None
        mask = encoder_attention_mask if crosses else attention_mask
        reason = why_plain(mask, hidden_states)
        if reason:
            return self.plainly(
                reason, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values,
                **others,
            )  # fmt: skip
        self.fusedly()
        query = self._heads(self.query, hidden_states)
        if crosses and past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) > 0:
            kept = past_key_values.layers[self.layer_idx]
            key, value = kept.keys, kept.values
        else:
            source = encoder_hidden_states if crosses else hidden_states
            key, value = self._heads(self.key, source), self._heads(self.value, source)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        found = ops.attention(
            query, key, value, dropout_p=rate(self.dropout), return_weights=wants_weights(self, others),
            **rules(mask, query.shape[2], key.shape[2]),
        )  # fmt: skip
        output, weights = found if isinstance(found, tuple) else (found, None)
        return output.transpose(1, 2).flatten(2), weights

    def _heads(self, project: Any, x: Any) -> Tensor:
        return project(x).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)


class FusedBlockSparseAttention(Fused):
    """BigBirdBlockSparseAttention."""

    def bigbird_block_sparse_attention(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        band_mask: Tensor,
        from_mask: Tensor,
        to_mask: Tensor,
        *others: Any,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns [B, S, H, D], zero for padding, and the weights [B, H, S, S] of a block drawn once, if asked for.

        Args:
            query_layer, key_layer, value_layer: [B, H, S, D].
            band_mask: padding within the blocks' windows, which `to_mask` tells as well.
            from_mask: [B, 1, S, 1], 0 for padding.
            to_mask: [B, 1, 1, S], 0 for padding.
            *others, **named: what the class's method takes besides, which the module holds as well.
        """
        reason = why_no_kernel("attention", query_layer)
        getattr(self, FUSION).count(reason)
        if reason:
            return self._plain_kind.bigbird_block_sparse_attention(  # type: ignore[attr-defined]
                self, query_layer, key_layer, value_layer, band_mask, from_mask, to_mask, *others, **named
            )
        counts = _counts(self, query_layer.shape[2])
        with np.errstate(divide="ignore"):
            bias = torch.from_numpy(np.log(counts)).to(query_layer.device, query_layer.dtype)
        bias = bias.repeat_interleave(self.block_size, 1).repeat_interleave(self.block_size, 2)
        found = ops.attention(
            query_layer, key_layer, value_layer, bias[None], key_mask=to_mask[:, 0, 0] != 0,
            return_weights=wants_weights(self, named),
        )  # fmt: skip
        output, weights = found if isinstance(found, tuple) else (found, None)
        if weights is not None:
            weights = weights / bias.exp().clamp_min(1.0)
        return (output * from_mask).transpose(1, 2), weights


def _counts(module: Any, length: int) -> np.ndarray:
    """Returns how often each block of keys counts for each block of queries, [H, S / block, S / block] or [1, ...]."""
    block, drawn = module.block_size, module.num_random_blocks
    blocks = length // block
    # The class draws while it trains, from numpy's one generator; in evaluation it always takes the first block.
    if module.training:
        np.random.seed(module.seed)  # noqa: NPY002
    if length in CUT:
        longest = module.max_seqlen
        random = [
            module._bigbird_block_rand_mask(longest, longest, block, block, drawn, last_idx=1024)[: blocks - 2]
            for _ in range(module.num_attention_heads)
        ]
    else:
        plan_length, plan_drawn = module._get_rand_attn_plan(length, block, drawn)
        random = module._bigbird_block_rand_mask_with_head(
            from_seq_length=length, to_seq_length=length, from_block_size=block, to_block_size=block,
            num_heads=module.num_attention_heads, plan_from_length=plan_length, plan_num_rand_blocks=plan_drawn,
        )  # fmt: skip
    place = np.arange(blocks)
    is_global = (place == 0) | (place == blocks - 1)
    seen = is_global[:, None] | is_global | (abs(place[:, None] - place) <= 1)
    counts = np.repeat(seen[None].astype(np.float32), module.num_attention_heads, 0)
    counts[:, 1:-1] += np.eye(blocks, dtype=np.float32)[np.stack(random)].sum(2)
    return counts[:1] if (counts == counts[:1]).all() else counts


class FusedBigBirdAttention(Fused):
    """BigBirdAttention, whose inner module, replaced by one of the other kind for short sequences, stays fused."""

    def set_attention_type(self, value: str, *args: Any, **named: Any) -> None:
        """Changes the kind, "original_full" or "block_sparse", for good."""
        fusion = fusion_of(self.self)
        self._plain_kind.set_attention_type(self, value, *args, **named)  # type: ignore[attr-defined]
        adapter = ADAPTERS.get(type(self.self).__name__)
        if fusion is None or adapter is None or why_left(self.self, adapter):
            return
        fuse(self.self, fusion.what, adapter.forward)
        # Its calls are counted where those of the one before it were.
        vars(self.self)[FUSION] = fusion


def _config(**options: Any) -> BigBirdConfig:
    return BigBirdConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16,
        max_position_embeddings=64, block_size=2, num_random_blocks=1, **options,
    )  # fmt: skip


def _full(kind: Any) -> Iterator[Trial]:
    x, source = torch.randn(2, 6, 16, dtype=torch.float32), torch.randn(2, 4, 16, dtype=torch.float32)
    mask = torch.full((2, 1, 6, 6), torch.finfo(torch.float32).min).triu(1)
    mask[1, :, 1:, 0] = -2.0

    def run(module: Any) -> Tensor:
        cache = DynamicCache()
        first = module(x[:, :2], mask[..., :2, :2], past_key_values=cache)[0]
        second = module(x[:, 2:], mask[..., 2:, :], past_key_values=cache)[0]
        return torch.cat((first, second, module(x, None, source, mask[..., :4])[0]), 1)

    yield Trial(kind(_config(), layer_idx=0), run)


def _sparse(kind: Any) -> Iterator[Trial]:
    x, valid = torch.randn(2, 20, 16, dtype=torch.float32), torch.ones(2, 20)
    valid[1, 17:] = 0
    blocks = valid.view(2, 10, 2)
    keys = torch.cat((blocks[:, 1:-3], blocks[:, 2:-2], blocks[:, 3:-1]), 2)
    band = (blocks[:, 2:-2, :, None] * keys[:, :, None])[:, None]

    def run(module: Any) -> Tensor:
        state = np.random.get_state()  # noqa: NPY002
        try:
            found = [
                module.train(mode)(x, band, valid[:, None, :, None], valid[:, None, None], blocks, blocks)[0]
                for mode in (True, False)
            ]
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return torch.cat(found)

    yield Trial(kind(_config(), seed=0), run)


def _either(kind: Any) -> Iterator[Trial]:
    x = torch.randn(2, 6, 16, dtype=torch.float32)

    def run(module: Any) -> Tensor:
        module.set_attention_type("block_sparse")
        module.set_attention_type("original_full")
        return module(x)[0]

    yield Trial(kind(_config(attention_type="original_full"), seed=0), run)


ADAPTERS = {
    "BigBirdSelfAttention": Adapter(FusedFullAttention, _full, reads_masks=True),
    "BigBirdBlockSparseAttention": Adapter(FusedBlockSparseAttention, _sparse),
    "BigBirdAttention": Adapter(FusedBigBirdAttention, _either, reads_masks=True),
}
