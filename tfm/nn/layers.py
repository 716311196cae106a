"""Encoder and decoder layers ("Attention Is All You Need", section 3.1 and figure 1; pre-norm: Xiong et al. 2020).

Each layer draws one seed a call; its dropouts (section 5.4) are numbered by the sites below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm import ops
from tfm.nn.attention import MultiheadAttention, attend, attention_dropout
from tfm.nn.children import DECODER_CHILDREN, ENCODER_CHILDREN, layer_obstacle, own_calls
from tfm.nn.norm import LayerNorm, widened
from tfm.nn.padding import Side, padded_scope
from tfm.nn.scope import Packed, Padded, as_added

SELF_WEIGHTS, SELF_RESIDUAL, CROSS_WEIGHTS, CROSS_RESIDUAL, HIDDEN, LAST_RESIDUAL = range(6)

FUSED_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`: self-attention and feed-forward network, each in "Add & Norm".

    A layer whose children carry hooks or parametrizations, or were replaced (LoRA, quantisation), calls them one by one
    as torch does, but never takes torch's fast path.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        _adopt_children(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Figure 1, left.

        Args:
            src: [B, S, E] (batch_first), [S, B, E] or [S, E].
            src_mask: [S, S] or [B · H, S, S]: bool (True = masked), or floating point, added to the scores.
            src_key_padding_mask: [B, S] or [S]: bool (True = padding), or floating point, added to the scores of its key.
            is_causal: hint that `src_mask` is the causal mask; without a mask, it stands for one.

        Returns:
            The form of `src`, 0 at padding.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        side = Side.of("src", src, self.self_attn.batch_first, src_key_padding_mask)
        if layer_obstacle(self, ENCODER_CHILDREN):
            added = (None if mask is None else as_added(mask, src.dtype) for mask in (src_mask, src_key_padding_mask))
            return side.leave(side.enter(self._call_children(src, *added, is_causal)))
        return side.leave(self.run(side.blank(side.x), padded_scope(side, side, src_mask, is_causal)))

    def run(self, x: Tensor, scope: Padded | Packed) -> Tensor:
        """The layer on [..., E], padded or packed as `scope` says."""
        seed = _draw_seed(self, x, (self.dropout, self.dropout1, self.dropout2))
        if self.norm_first:
            y = _norm(self.norm1, x)
            y, x = _add_norm(attend(self.self_attn, y, y, scope, seed, SELF_WEIGHTS), x, self.norm2, self.dropout1, seed, SELF_RESIDUAL)
            return x + _dropout(_feed_forward(self, y, seed), self.dropout2, seed, LAST_RESIDUAL)
        x = widened(x)
        x, _ = _add_norm(attend(self.self_attn, x, x, scope, seed, SELF_WEIGHTS), x, self.norm1, self.dropout1, seed, SELF_RESIDUAL)
        x, _ = _add_norm(_feed_forward(self, x, seed), x, self.norm2, self.dropout2, seed, LAST_RESIDUAL)
        return x

    def _call_children(self, x, mask, padding_mask, is_causal) -> Tensor:
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))
