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
from tfm.nn.fusible import DECODER_CHILDREN, ENCODER_CHILDREN, own_calls, why_layer_unfusible
from tfm.nn.leaf import leaf
from tfm.nn.masks import AttentionMask, as_added
from tfm.nn.norm import LayerNorm, widened
from tfm.nn.packing import SequenceInput, check_same_batch, padded_mask

SELF_WEIGHTS, SELF_RESIDUAL, CROSS_WEIGHTS, CROSS_RESIDUAL, HIDDEN, LAST_RESIDUAL = range(6)

# torch's classes as they are at import: another library may put its own under their names later.
ADOPTED = {torch.nn.MultiheadAttention: MultiheadAttention, torch.nn.LayerNorm: LayerNorm}
FUSED_FUNCTIONS: dict[Callable[..., Tensor], str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


class Adopting:
    """The constructor of torch's layers, after which a layer's children are tfm.nn's."""

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
        super().__init__(  # type: ignore[call-arg]
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        assert isinstance(self, torch.nn.Module)
        for child in self.children():
            child.__class__ = ADOPTED.get(type(child), type(child))


@leaf
class TransformerEncoderLayer(Adopting, torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`: self-attention and feed-forward network, each in "Add & Norm".

    A layer whose children carry hooks or parametrizations, or were replaced (LoRA, quantisation), calls them one by one
    as torch does, but never takes torch's fast path.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Runs self-attention and the feed-forward network on `src` (figure 1, left).

        Args:
            src: [B, S, E] (batch_first), [S, B, E] or [S, E].
            src_mask: [S, S] or [B · H, S, S]: bool (True = masked), or floating point, added to the scores.
            src_key_padding_mask: [B, S] or [S]: bool (True = padding), or floating point, added to its key's scores.
            is_causal: hint that `src_mask` is the causal mask; without a mask, it stands for one.

        Returns:
            The output in the form of `src`, 0 at padding.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        source = SequenceInput.of("src", src, self.self_attn.batch_first, src_key_padding_mask)
        if why_layer_unfusible(self, ENCODER_CHILDREN):
            mask, padding = as_added(src_mask, src.dtype), as_added(src_key_padding_mask, src.dtype)
            return source.leave(source.enter(self._call_children(src, mask, padding, is_causal)))
        return source.leave(
            self.run(source.blank(source.x), padded_mask(source, source, self.self_attn.num_heads, src_mask, is_causal))
        )

    def run(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Runs the layer on [..., E], padded or packed as `mask` says."""
        seed = _draw_seed(self.self_attn, self.dropout, self.dropout1, self.dropout2, device=x.device)
        if self.norm_first:
            y = _norm(x, self.norm1)
            y = attend(self.self_attn, y, y, mask, seed, SELF_WEIGHTS)
            y, x = _add_norm(y, self.self_attn.out_proj, x, self.norm2, self.dropout1, seed, SELF_RESIDUAL)
            y = _feed_forward(self, y, seed)
            return _add(y, self.linear2, x, self.dropout2, seed, LAST_RESIDUAL)
        x = widened(x)
        y = attend(self.self_attn, x, x, mask, seed, SELF_WEIGHTS)
        x, _ = _add_norm(y, self.self_attn.out_proj, x, self.norm1, self.dropout1, seed, SELF_RESIDUAL)
        y = _feed_forward(self, x, seed)
        x, _ = _add_norm(y, self.linear2, x, self.norm2, self.dropout2, seed, LAST_RESIDUAL)
        return x

    def _call_children(self, x: Tensor, mask: Tensor | None, padding_mask: Tensor | None, is_causal: bool) -> Tensor:
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


@leaf
class TransformerDecoderLayer(Adopting, torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`: self-attention, attention over the memory and feed-forward network.

    What `TransformerEncoderLayer` says of its children holds here too.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Runs self-attention on `tgt`, attention over `memory`, and the feed-forward network (figure 1, right).

        Args:
            tgt: [B, T, E] (batch_first), [T, B, E] or [T, E].
            memory: [B, S, E], [S, B, E] or [S, E].
            tgt_mask: [T, T] or [B · H, T, T]: bool (True = masked), or floating point, added to the scores.
            memory_mask: [T, S] or [B · H, T, S], likewise.
            tgt_key_padding_mask: [B, T] or [T]: bool (True = padding), or floating point, added to its key's scores.
            memory_key_padding_mask: [B, S] or [S], likewise.
            tgt_is_causal: hint that `tgt_mask` is the causal mask; without a mask, it stands for one.
            memory_is_causal: likewise of `memory_mask`.

        Returns:
            The output in the form of `tgt`, 0 at its padding.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        batch_first = self.self_attn.batch_first
        queries = SequenceInput.of("tgt", tgt, batch_first, tgt_key_padding_mask)
        if why_layer_unfusible(self, DECODER_CHILDREN):
            output = super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                tgt_is_causal, memory_is_causal,
            )  # fmt: skip
            return queries.leave(queries.enter(output))
        keys = SequenceInput.of("memory", memory, batch_first, memory_key_padding_mask)
        check_same_batch(tgt=queries, memory=keys)
        self_mask = padded_mask(queries, queries, self.self_attn.num_heads, tgt_mask, tgt_is_causal)
        cross_mask = padded_mask(queries, keys, self.multihead_attn.num_heads, memory_mask, memory_is_causal)
        return queries.leave(self.run(queries.blank(queries.x), keys.blank(keys.x), self_mask, cross_mask))

    def run(self, x: Tensor, memory: Tensor, self_mask: AttentionMask, cross_mask: AttentionMask) -> Tensor:
        """Runs the layer on [..., E] tokens and memory, padded or packed as the masks say."""
        dropouts = (self.dropout, self.dropout1, self.dropout2, self.dropout3)
        seed = _draw_seed(self.self_attn, self.multihead_attn, *dropouts, device=x.device)
        if self.norm_first:
            y = _norm(x, self.norm1)
            y = attend(self.self_attn, y, y, self_mask, seed, SELF_WEIGHTS)
            y, x = _add_norm(y, self.self_attn.out_proj, x, self.norm2, self.dropout1, seed, SELF_RESIDUAL)
            y = attend(self.multihead_attn, y, memory, cross_mask, seed, CROSS_WEIGHTS)
            y, x = _add_norm(y, self.multihead_attn.out_proj, x, self.norm3, self.dropout2, seed, CROSS_RESIDUAL)
            y = _feed_forward(self, y, seed)
            return _add(y, self.linear2, x, self.dropout3, seed, LAST_RESIDUAL)
        x = widened(x)
        y = attend(self.self_attn, x, x, self_mask, seed, SELF_WEIGHTS)
        x, _ = _add_norm(y, self.self_attn.out_proj, x, self.norm1, self.dropout1, seed, SELF_RESIDUAL)
        y = attend(self.multihead_attn, x, memory, cross_mask, seed, CROSS_WEIGHTS)
        x, _ = _add_norm(y, self.multihead_attn.out_proj, x, self.norm2, self.dropout2, seed, CROSS_RESIDUAL)
        y = _feed_forward(self, x, seed)
        x, _ = _add_norm(y, self.linear2, x, self.norm3, self.dropout3, seed, LAST_RESIDUAL)
        return x


def rate(module: torch.nn.Dropout | torch.nn.MultiheadAttention) -> float:
    """Returns the probability with which a dropout or an attention drops now: each obeys its own training flag."""
    if isinstance(module, torch.nn.Dropout):
        return module.p if module.training else 0.0
    return attention_dropout(module)


def fused_activation(activation: Callable[[Tensor], Tensor]) -> str:
    """Returns the name by which tfm.ops.feed_forward knows `activation`; empty where it does not."""
    if not isinstance(activation, torch.nn.Module):
        return FUSED_FUNCTIONS.get(activation, "")
    if own_calls(activation):
        return ""
    if type(activation) is torch.nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}.get(type(activation), "")


def _draw_seed(*modules: torch.nn.Dropout | torch.nn.MultiheadAttention, device: torch.device) -> Tensor | None:
    return ops.draw_seed(device) if any(rate(module) > 0.0 for module in modules) else None


def _norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _add_norm(
    y: Tensor,
    linear: torch.nn.Linear,
    residual: Tensor,
    norm: torch.nn.LayerNorm,
    dropout: torch.nn.Dropout,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """Returns (normed, sum) of a sublayer's output `y`; the norm's pass adds the bias of `linear`, its last layer."""
    return ops.residual_layer_norm(
        y, residual, norm.weight, norm.bias, norm.eps, rate(dropout), x_bias=linear.bias, seed=seed, site=site
    )


def _add(
    y: Tensor, linear: torch.nn.Linear, residual: Tensor, dropout: torch.nn.Dropout, seed: Tensor | None, site: int
) -> Tensor:
    """Returns `_add_norm`'s sum alone."""
    y = y if linear.bias is None else y + linear.bias.to(y.dtype)
    return residual + ops.dropout(y, rate(dropout), seed=seed, site=site)


def _feed_forward(layer: TransformerEncoderLayer | TransformerDecoderLayer, x: Tensor, seed: Tensor | None) -> Tensor:
    """Computes equation 2 (3.3) with the layer's own activation, and without the bias of linear2."""
    first, second, dropout_p = layer.linear1, layer.linear2, rate(layer.dropout)
    name = fused_activation(layer.activation)
    if name:
        return ops.feed_forward(
            x, first.weight, first.bias, second.weight, None, name, dropout_p, seed=seed, site=HIDDEN
        )
    hidden = layer.activation(F.linear(x, first.weight, first.bias))
    return F.linear(ops.dropout(hidden, dropout_p, seed=seed, site=HIDDEN), second.weight)
