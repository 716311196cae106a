"""Builds what the bundled model is measured against: plain torch.nn.Transformer, and each way to run it.

`TorchTranslator` is the same function of the same weights as `tfm.model.Transformer`, and takes the same batches
through the same interface, so that `tfm.train.Training` trains either. Whatever made it faster, and a user of torch
could write, was kept; what was tried and did not help is named where it would stand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfm import ops
from tfm.config import TransformerConfig
from tfm.model import Transformer
from tfm.sequences import Ragged
from tfm.tokenizer import PAD

# Logits of so many rows at a time stay in a CPU's cache and below malloc's mmap threshold: a sixth of the step.
CPU_LOSS_ROWS = 256


@dataclass(frozen=True)
class Contender:
    """Names one way to train: whose model, in which dtype (bf16 is autocast, weights fp32), compiled or not."""

    torch_model: bool
    dtype: str = "float32"
    compiled: bool = False

    def build(self, config: TransformerConfig, device: torch.device) -> nn.Module:
        """Returns a model in train mode with the recipe's weights to begin with: under one seed the same for all."""
        ours = Transformer(config)
        if not self.torch_model:
            return ours.to(device)
        theirs = TorchTranslator(config)
        copy_weights(ours, theirs)
        theirs.to(device)
        if self.compiled:
            theirs.compile_parts()
        return theirs


CONTENDERS = {
    "tfm": Contender(torch_model=False),
    "tfm-bf16": Contender(torch_model=False, dtype="bfloat16"),
    "eager": Contender(torch_model=True),
    "eager-bf16": Contender(torch_model=True, dtype="bfloat16"),
    "compile": Contender(torch_model=True, compiled=True),
    "compile-bf16": Contender(torch_model=True, dtype="bfloat16", compiled=True),
}


class TorchTranslator(nn.Module):
    """Builds the post-norm encoder-decoder from torch.nn's layers; `forward` and `loss` as in tfm.model.Transformer."""

    positions: Tensor
    causal_mask: Tensor

    def __init__(self, config: TransformerConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if config.norm_first:
            raise ValueError("config: expected a post-norm model, got norm_first=True")
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim, dtype=dtype))
        self.dropout = nn.Dropout(config.dropout)
        layer = {
            "d_model": config.dim,
            "nhead": config.heads,
            "dim_feedforward": config.ffn_dim,
            "dropout": config.dropout,
            "activation": getattr(F, config.activation),
            "layer_norm_eps": config.norm_eps,
            "batch_first": True,  # [S, B, dim] was no faster
            "dtype": dtype,
        }
        # Built by hand, since nn.Transformer by itself ends both stacks in a norm that the paper does not have.
        self.transformer = nn.Transformer(
            config.dim,
            config.heads,
            custom_encoder=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer), config.encoder_layers, enable_nested_tensor=False
            ),
            custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), config.decoder_layers),
            batch_first=True,
        )
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = config.attention_dropout
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = config.activation_dropout
        positions = ops.sinusoid(torch.arange(config.max_length), config.dim, dtype)
        causal_mask = nn.Transformer.generate_square_subsequent_mask(config.max_length, dtype=dtype)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("causal_mask", causal_mask, persistent=False)
        self.loss_rows: int | None = None

    def compile_parts(self) -> None:
        """Compiles the stacks and the loss, each once for all shapes."""
        # Without it, equal lengths in the first batch become a guard, and each later batch compiles anew.
        torch.fx.experimental._config.use_duck_shape = False
        # At that limit Dynamo runs eagerly without a word.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.hidden = torch.compile(self.hidden, dynamic=True)  # type: ignore[method-assign]
        self.cross_entropy = torch.compile(self.cross_entropy, dynamic=True)  # type: ignore[method-assign]
        self.loss_rows = 1 << 30  # Inductor fuses the softmax, and would compile each chunk

    def forward(self, source: Ragged, target: Ragged) -> Tensor:
        """Maps source tokens [Ns] and target tokens [Nt] to the decoder's output [Nt, dim].

        Only token ids are padded and unpadded around the stacks. Dropping padding before the loss is faster than
        computing its logits and ignoring them.
        """
        padded = source.padded()
        # Sorted by length, most batches have no padding in the source, and then attention needs no mask.
        padding_mask = None
        if padded.numel() > source.layout.rows:
            padding_mask = self.causal_mask.new_zeros(padded.shape).masked_fill_(padded == PAD, -math.inf)
        hidden = self.hidden(padded, target.padded(), padding_mask).flatten(0, 1)
        rows = target.layout.rows
        return hidden if len(hidden) == rows else hidden.index_select(0, target.layout.indices.to_packed)

    def hidden(self, source: Tensor, target: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Maps padded [B, S] and [B, T] and an additive mask [B, S] to [B, T, dim].

        Padding ends each row, so the causal mask already hides it from every real target, and SDPA takes its causal
        path: torch does so where the hint is given and there is no padding mask.
        """
        length = target.shape[1]
        return self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=self.causal_mask[:length, :length],
            tgt_is_causal=True,
            src_key_padding_mask=padding_mask,
            memory_key_padding_mask=padding_mask,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Maps [B, S] to [B, S, dim]."""
        rows = F.embedding(tokens, self.embedding) * math.sqrt(self.config.dim)
        return self.dropout(rows + self.positions[: tokens.shape[1]])

    def loss(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Returns the mean cross-entropy of [N, dim] against [N].

        torch's own chunked F.linear_cross_entropy takes no label smoothing (2.13), and its other path is this one.
        """
        chunk = self.loss_rows or (CPU_LOSS_ROWS if hidden.device.type == "cpu" else len(hidden))
        if len(hidden) <= chunk:
            return self.cross_entropy(hidden, target, label_smoothing) / len(hidden)
        parts = zip(hidden.split(chunk), target.split(chunk), strict=True)
        return torch.stack([self.cross_entropy(*part, label_smoothing) for part in parts]).sum() / len(hidden)

    def cross_entropy(self, hidden: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
        logits = F.linear(hidden, self.embedding)
        return F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)


class Rows(NamedTuple):
    """Pairs rows of a parameter of ours with the rows of a parameter of theirs that mean the same."""

    ours: Tensor
    our_rows: slice
    theirs: Tensor
    their_rows: slice


def copy_weights(ours: Transformer, theirs: TorchTranslator) -> None:
    """Makes `theirs` the same function as `ours`."""
    for rows in corresponding(ours, theirs):
        rows.theirs.data[rows.their_rows] = rows.ours.data[rows.our_rows]


def copy_back(theirs: TorchTranslator, ours: Transformer) -> None:
    """Makes `ours` the same function as `theirs`."""
    for rows in corresponding(ours, theirs):
        rows.ours.data[rows.our_rows] = rows.theirs.data[rows.their_rows]


def corresponding(ours: Transformer, theirs: TorchTranslator) -> Iterator[Rows]:
    """Yields every row of every parameter of both models, once."""
    dim, every = ours.config.dim, slice(None)
    yield Rows(ours.embedding, every, theirs.embedding, every)
    for our_layer, layer in zip(ours.encoder.layers, theirs.transformer.encoder.layers, strict=True):
        yield from _attention(our_layer.self_attention, layer.self_attn, every)
        yield from _module(our_layer.self_attention_norm, layer.norm1)
        yield from _feed_forward(our_layer.feed_forward, layer)
        yield from _module(our_layer.feed_forward_norm, layer.norm2)
    for index, (our_layer, layer) in enumerate(
        zip(ours.decoder.layers, theirs.transformer.decoder.layers, strict=True)
    ):
        yield from _attention(our_layer.self_attention, layer.self_attn, every)
        yield from _module(our_layer.self_attention_norm, layer.norm1)
        yield from _attention(our_layer.cross_attention, layer.multihead_attn, slice(dim))
        # Ours projects the memory for all layers at once.
        memory, rows = ours.decoder.memory_projection, slice(2 * dim * index, 2 * dim * (index + 1))
        yield Rows(memory.weight, rows, layer.multihead_attn.in_proj_weight, slice(dim, None))
        yield Rows(memory.bias, rows, layer.multihead_attn.in_proj_bias, slice(dim, None))
        yield from _module(our_layer.cross_attention_norm, layer.norm2)
        yield from _feed_forward(our_layer.feed_forward, layer)
        yield from _module(our_layer.feed_forward_norm, layer.norm3)


def _attention(ours: Any, theirs: Any, their_rows: slice) -> Iterator[Rows]:
    yield Rows(ours.projection.weight, slice(None), theirs.in_proj_weight, their_rows)
    yield Rows(ours.projection.bias, slice(None), theirs.in_proj_bias, their_rows)
    yield from _module(ours.output, theirs.out_proj)


def _feed_forward(ours: Any, theirs: Any) -> Iterator[Rows]:
    yield from _module(ours.inner, theirs.linear1)
    yield from _module(ours.outer, theirs.linear2)


def _module(ours: Any, theirs: Any) -> Iterator[Rows]:
    for name in ("weight", "bias"):
        yield Rows(getattr(ours, name), slice(None), getattr(theirs, name), slice(None))
