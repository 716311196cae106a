"""Stacks of layers, and the whole Transformer ("Attention Is All You Need", section 3.1 and figure 1).

Where lengths or padding masks are given and the mask is none or causal, an eager stack packs the batch at its door and
unpacks it at its exit, so that no layer computes on padding; the shapes outside are torch's. Under torch.compile, in
graph capture, with other masks, with padding anywhere but at the right, or with an activation that tfm.ops does not
know, tensors stay padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.errors import BadArgument
from tfm.nn.fusible import own_calls, why_stack_unfusible
from tfm.nn.layers import TransformerDecoderLayer, TransformerEncoderLayer, fused_activation
from tfm.nn.leaf import leaf
from tfm.nn.masks import AttentionMask, PackedMask, as_added
from tfm.nn.norm import LayerNorm
from tfm.nn.packing import Lengths, SequenceInput, check_same_batch, padded_mask, plan_packing


@leaf
class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`, on packed batches where it can; never on nested tensors of its own.

    Where a layer is no `tfm.nn.TransformerEncoderLayer` or anything in it carries hooks, layers are called one by one.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> Tensor:
        """Runs the layers on `src` one after another, then the final norm if there is one (figure 1, left).

        Args:
            src: [B, S, E] (batch_first), [S, B, E] or [S, E].
            mask: [S, S] or [B · H, S, S]: bool (True = masked), or floating point, added to the scores.
            src_key_padding_mask: [B, S] or [S]: bool (True = padding), or floating point, added to its key's scores.
            is_causal: hint that `mask` is the causal mask; None = look. True without a mask stands for one.
            lengths: [B], in place of `src_key_padding_mask`: a sequence or an integer tensor. What the host knows is
                not read from the device.

        Returns:
            The output in the form of `src`, 0 at padding.

        Raises:
            ValueError: shapes or dtypes that do not fit, lengths outside [0, S] or beside a padding mask.
        """
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        source = SequenceInput.of("src", src, _batch_first(self), src_key_padding_mask, lengths)
        unfusible = why_stack_unfusible(self.layers, self.norm, TransformerEncoderLayer)
        packing = not unfusible and _knows_activations(self.layers)
        [causal], layouts = plan_packing([source], [(mask, is_causal)], packing)
        if unfusible:
            mask, padding = as_added(mask, src.dtype), as_added(source.callers_mask(), src.dtype)
            for layer in self.layers:
                src = layer(src, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
            return source.leave(source.enter(src if self.norm is None else self.norm(src)))
        if layouts:
            packed = self.run(source.pack(layouts[0]), PackedMask(layouts[0], layouts[0], causal))
            return source.unpack(packed, layouts[0])
        return source.leave(
            self.run(
                source.blank(source.x), padded_mask(source, source, self.layers[0].self_attn.num_heads, mask, causal)
            )
        )

    def run(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Runs the stack on [..., E], padded or packed as `mask` says."""
        for layer in self.layers:
            x = layer.run(x, mask)
        return x if self.norm is None else self.norm(x)


@leaf
class TransformerDecoder(torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`, on packed batches where it can.

    Where a layer is no `tfm.nn.TransformerDecoderLayer` or anything in it carries hooks, layers are called one by one.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        tgt_lengths: Lengths | None = None,
        memory_lengths: Lengths | None = None,
    ) -> Tensor:
        """Runs the layers on `tgt` and `memory`, then the final norm if there is one (figure 1, right).

        Args:
            tgt: [B, T, E] (batch_first), [T, B, E] or [T, E].
            memory: [B, S, E], [S, B, E] or [S, E].
            tgt_mask: [T, T] or [B · H, T, T]: bool (True = masked), or floating point, added to the scores.
            memory_mask: [T, S] or [B · H, T, S], likewise; with one, tensors stay padded.
            tgt_key_padding_mask: [B, T] or [T]: bool (True = padding), or floating point, added to its key's scores.
            memory_key_padding_mask: [B, S] or [S], likewise.
            tgt_is_causal: hint that `tgt_mask` is the causal mask; None = look. True without a mask stands for one.
            memory_is_causal: hint that `memory_mask` is the causal mask; without a mask, it stands for one.
            tgt_lengths, memory_lengths: [B], in place of the padding masks: a sequence or an integer tensor. What the
                host knows is not read from the device.

        Returns:
            The output in the form of `tgt`, 0 at its padding.

        Raises:
            ValueError: shapes or dtypes that do not fit, lengths outside [0, length] or beside a padding mask.
        """
        batch_first = _batch_first(self)
        queries = SequenceInput.of("tgt", tgt, batch_first, tgt_key_padding_mask, tgt_lengths)
        keys = SequenceInput.of("memory", memory, batch_first, memory_key_padding_mask, memory_lengths)
        check_same_batch(tgt=queries, memory=keys)
        unfusible = why_stack_unfusible(self.layers, self.norm, TransformerDecoderLayer)
        packing = not unfusible and memory_mask is None and _knows_activations(self.layers)
        [causal], layouts = plan_packing([queries, keys], [(tgt_mask, tgt_is_causal)], packing)
        if unfusible:
            output = super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                queries.callers_mask(),
                keys.callers_mask(),
                causal,
                memory_is_causal,
            )
            return queries.leave(queries.enter(output))
        if layouts:
            inner, outer = layouts
            masks = PackedMask(inner, inner, causal), PackedMask(inner, outer, memory_is_causal)
            return queries.unpack(self.run(queries.pack(inner), keys.pack(outer), *masks), inner)
        self_mask = padded_mask(queries, queries, self.layers[0].self_attn.num_heads, tgt_mask, causal)
        cross_mask = padded_mask(queries, keys, self.layers[0].multihead_attn.num_heads, memory_mask, memory_is_causal)
        return queries.leave(self.run(queries.blank(queries.x), keys.blank(keys.x), self_mask, cross_mask))

    def run(self, x: Tensor, memory: Tensor, self_mask: AttentionMask, cross_mask: AttentionMask) -> Tensor:
        """Runs the stack on [..., E] tokens and memory, padded or packed as the masks say."""
        for layer in self.layers:
            x = layer.run(x, memory, self_mask, cross_mask)
        return x if self.norm is None else self.norm(x)


@leaf
class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer`: the encoder-decoder of the paper, without embeddings and the final linear layer.

    The same arguments, the same initial weights after the same `torch.manual_seed`.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        if custom_encoder is None:
            norm = LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
            custom_encoder = TransformerEncoder(
                TransformerEncoderLayer(*layer), num_encoder_layers, norm, enable_nested_tensor=False
            )
        if custom_decoder is None:
            norm = LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
            custom_decoder = TransformerDecoder(TransformerDecoderLayer(*layer), num_decoder_layers, norm)
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        src_lengths: Lengths | None = None,
        tgt_lengths: Lengths | None = None,
    ) -> Tensor:
        """Encodes `src` and decodes `tgt` over the result (figure 1).

        Args:
            src: [B, S, E] (batch_first), [S, B, E] or [S, E].
            tgt: [B, T, E], [T, B, E] or [T, E].
            src_mask, tgt_mask, memory_mask: as in `TransformerEncoder` and `TransformerDecoder`.
            src_key_padding_mask, tgt_key_padding_mask, memory_key_padding_mask: likewise. The memory is 0 at the
                padding of `src`; a decoder that shall not attend there is told so by its own mask, as in torch.
            src_is_causal, tgt_is_causal, memory_is_causal: likewise.
            src_lengths: [B], in place of both `src_key_padding_mask` and `memory_key_padding_mask`.
            tgt_lengths: [B], in place of `tgt_key_padding_mask`.

        Returns:
            The output in the form of `tgt`, 0 at its padding.

        Raises:
            ValueError: shapes or dtypes that do not fit, lengths beside a padding mask, or given to a custom encoder or
                decoder that does not know them.
        """
        dim = 0 if self.batch_first else 1
        if src.dim() == 3 and src.shape[dim] != tgt.shape[dim]:
            raise BadArgument(f"tgt: expected batch {src.shape[dim]} like src, got shape {tuple(tgt.shape)}")
        for name, x in (("src", src), ("tgt", tgt)):
            if x.shape[-1] != self.d_model:
                raise BadArgument(f"{name}: expected [..., {self.d_model}], got shape {tuple(x.shape)}")
        ragged = any(
            given is not None for given in (src_key_padding_mask, tgt_key_padding_mask, src_lengths, tgt_lengths)
        )
        same_padding = memory_key_padding_mask is (src_key_padding_mask if src_lengths is None else None)
        if ragged and same_padding and memory_mask is None and _hands_on_packed(self.encoder, self.decoder):
            sources = SequenceInput.of("src", src, _batch_first(self.encoder), src_key_padding_mask, src_lengths)
            targets = SequenceInput.of("tgt", tgt, _batch_first(self.decoder), tgt_key_padding_mask, tgt_lengths)
            check_same_batch(src=sources, tgt=targets)
            masks = [(src_mask, src_is_causal), (tgt_mask, tgt_is_causal)]
            causal, layouts = plan_packing([sources, targets], masks, packing=True)
            if layouts:
                outer, inner = layouts
                memory = self.encoder.run(sources.pack(outer), PackedMask(outer, outer, causal[0]))
                decoder_masks = PackedMask(inner, inner, causal[1]), PackedMask(inner, outer, memory_is_causal)
                return targets.unpack(self.decoder.run(targets.pack(inner), memory, *decoder_masks), inner)
        encoder_lengths, decoder_lengths = {}, {}
        if src_lengths is not None:
            encoder_lengths, decoder_lengths = {"lengths": src_lengths}, {"memory_lengths": src_lengths}
        if tgt_lengths is not None:
            decoder_lengths["tgt_lengths"] = tgt_lengths
        for stack, known, given in (
            (self.encoder, TransformerEncoder, encoder_lengths),
            (self.decoder, TransformerDecoder, decoder_lengths),
        ):
            if given and not isinstance(stack, known):
                raise ValueError(f"lengths: expected none, {type(stack)} does not take them")
        memory = self.encoder(
            src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal, **encoder_lengths
        )
        return self.decoder(
            tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal, **decoder_lengths,
        )  # fmt: skip


def _hands_on_packed(encoder: Any, decoder: Any) -> bool:
    """Tells whether the memory may go from `encoder` to `decoder` packed, as nobody is to see it between them."""
    kinds = (
        (encoder, TransformerEncoder, TransformerEncoderLayer),
        (decoder, TransformerDecoder, TransformerDecoderLayer),
    )
    return all(
        type(stack) is kind
        and not own_calls(stack)
        and not why_stack_unfusible(stack.layers, stack.norm, layer_type)
        and _knows_activations(stack.layers)
        for stack, kind, layer_type in kinds
    )


def _batch_first(stack: Any) -> bool:
    return stack.layers[0].self_attn.batch_first


def _knows_activations(layers: Any) -> bool:
    # Any other callable may depend on the shape it is given.
    return all(fused_activation(layer.activation) for layer in layers)
