"""BigBird: full attention, block-sparse attention, and the change from one to the other.

In block-sparse attention (Zaheer et al. 2020, "Big Bird", section 2) each block of queries attends to a few blocks of
keys, which are put side by side: a batch of short attentions. A block that is drawn at random although it is attended
to anyway counts once more in the softmax. The first and the last block attend to all.
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
        """Returns [B, S, H, D], zero for padding, and None, or the weights as the class has them, if asked for.

        Args:
            query_layer, key_layer, value_layer: [B, H, S, D].
            band_mask: padding within the blocks' windows, which `to_mask` tells as well.
            from_mask: [B, 1, S, 1], 0 for padding.
            to_mask: [B, 1, 1, S], 0 for padding.
            *others, **named: what the class's method takes besides, which the module holds as well.
        """
        reason = "weights by blocks are asked for" if wants_weights(self, named) else ""
        reason = reason or why_no_kernel("attention", query_layer)
        getattr(self, FUSION).count(reason)
        if reason:
            return self._plain_kind.bigbird_block_sparse_attention(  # type: ignore[attr-defined]
                self, query_layer, key_layer, value_layer, band_mask, from_mask, to_mask, *others, **named
            )
        size, valid = self.block_size, to_mask[:, 0, 0] != 0
        heads, length = query_layer.shape[1:3]
        listed, counts = (torch.from_numpy(x).to(query_layer.device) for x in _listed(self, length // size))
        # [B, blocks, H, listed, size, D], and their keys one after the other
        head = torch.arange(heads, device=query_layer.device)[:, None]
        key, value = (
            x.unflatten(2, (-1, size)).transpose(1, 2)[:, listed, head].flatten(0, 1).flatten(2, 3)
            for x in (key_layer, value_layer)
        )
        mask = (valid.unflatten(1, (-1, size))[:, listed] & counts[:, None, :, None]).flatten(0, 1).flatten(2)
        query = query_layer.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
        few = ops.attention(query, key, value, **rules(mask[:, :, None], size, key.shape[2]))
        few = few.transpose(1, 2).unflatten(0, (-1, length // size)).flatten(1, 2)
        ends = torch.cat((query_layer[:, :, :size], query_layer[:, :, -size:]), 2)
        first, last = ops.attention(ends, key_layer, value_layer, key_mask=valid).transpose(1, 2).split(size, 1)
        return torch.cat((first, few[:, size:-size], last), 1) * from_mask.transpose(1, 2), None


def _listed(module: Any, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the blocks of keys of each block of queries, [blocks, H or 1, n], and which count, [blocks, n].

    Those of the first and the last block mean nothing.
    """
    drawn = np.stack(_drawn(module, blocks)).transpose(1, 0, 2)
    drawn = np.pad(drawn, ((1, 1), (0, 0), (0, 0)))
    if (drawn == drawn[:, :1]).all():
        drawn = drawn[:, :1]
    place = np.arange(blocks)
    near = np.stack((place * 0, place - 1, place, place + 1, place * 0 + blocks - 1), 1).clip(0, blocks - 1)
    listed = np.concatenate((np.broadcast_to(near[:, None], (*drawn.shape[:2], 5)), drawn), 2)
    counts = np.ones((blocks, listed.shape[2]), dtype=bool)
    # The neighbours of the second and of the last but one are those that all attend to.
    counts[1, 1] = counts[blocks - 2, 3] = False
    return listed.astype(np.int64), counts


def _drawn(module: Any, blocks: int) -> list[np.ndarray]:
    """Returns the blocks [blocks - 2, n] that each head draws for all blocks of queries but the first and the last."""
    size, drawn = module.block_size, module.num_random_blocks
    # The class draws while it trains, from numpy's one generator; in evaluation it always takes the first block.
    if module.training:
        np.random.seed(module.seed)  # noqa: NPY002
    if blocks * size in CUT:
        longest = module.max_seqlen
        return [
            module._bigbird_block_rand_mask(longest, longest, size, size, drawn, last_idx=1024)[: blocks - 2]
            for _ in range(module.num_attention_heads)
        ]
    plan_length, plan_drawn = module._get_rand_attn_plan(blocks * size, size, drawn)
    return module._bigbird_block_rand_mask_with_head(
        from_seq_length=blocks * size, to_seq_length=blocks * size, from_block_size=size, to_block_size=size,
        num_heads=module.num_attention_heads, plan_from_length=plan_length, plan_num_rand_blocks=plan_drawn,
    )  # fmt: skip


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
    x, source = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    mask = torch.full((2, 1, 6, 6), torch.finfo(torch.float32).min).triu(1)
    mask[1, :, 1:, 0] = -2.0

    def run(module: Any) -> Tensor:
        cache = DynamicCache()
        first = module(x[:, :2], mask[..., :2, :2], past_key_values=cache)[0]
        second = module(x[:, 2:], mask[..., 2:, :], past_key_values=cache)[0]
        return torch.cat((first, second, module(x, None, source, mask[..., :4])[0]), 1)

    yield Trial(kind(_config(), layer_idx=0), run)


def _sparse(kind: Any) -> Iterator[Trial]:
    x, valid = torch.randn(2, 20, 16), torch.ones(2, 20)
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
    x = torch.randn(2, 6, 16)

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
