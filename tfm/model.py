"""The encoder-decoder Transformer of "Attention Is All You Need" (Vaswani et al. 2017), on packed batches.

Sentences lie end to end, without padding: tokens are [N], activations [N, dim], and a `Layout` says where each
sentence begins. Read from the top: the whole model, its stacks, their layers, the sublayers.

Every layer norm stands *after* a sublayer, fused with that sublayer's dropout and residual connection. A post-norm
model carries the norm's output on; a pre-norm model carries the sum, and the norm after one sublayer is the norm before
the next, so that it differs by one flag and one norm ahead of the first sublayer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfm import ops
from tfm.config import TransformerConfig
from tfm.sequences import Layout, Ragged

# The dropouts of a step share a seed; each has a number of its own, so that no two draw the same mask.
SITES_PER_LAYER = 8


@dataclass(frozen=True)
class State:
    """The tensors that run through a stack, [N, dim]: the residual `stream` and the next sublayer's `normed` input."""

    stream: Tensor
    normed: Tensor


@dataclass(frozen=True)
class Unbiased:
    """The output of a sublayer: its last product, and the bias that "Add & Norm" adds in its own pass."""

    product: Tensor
    bias: Tensor


class Transformer(nn.Module):
    """The whole model (figure 1). One matrix serves both embeddings and, transposed, the final linear layer (3.4)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.encoder = Encoder(config, first_site=2)
        self.decoder = Decoder(config, first_site=2 + SITES_PER_LAYER * config.encoder_layers)
        nn.init.normal_(self.embedding, std=config.dim**-0.5)

    def forward(self, source: Ragged, target: Ragged) -> Tensor:
        """Returns the decoder's output for each target token, given those before it.

        Args:
            source, target: token ids int64 [Ns] and [Nt], of B sentences each; those of `target` begin with BOS.

        Returns:
            [Nt, dim]; `loss` and `logits` apply the final linear layer.
        """
        seed = self.draw_seed()
        return self.decode(target, self.encode(source, seed), seed)

    def encode(self, source: Ragged, seed: Tensor | None) -> Ragged:
        """Turns source tokens [Ns] into the memory [Ns, dim]."""
        embedded = self.embed(source.values, source.layout.positions, seed, site=0)
        return Ragged(self.encoder(embedded, source.layout, seed), source.layout)

    def decode(self, target: Ragged, memory: Ragged, seed: Tensor | None) -> Tensor:
        """Turns target tokens [Nt] and the memory [Ns, dim] into [Nt, dim]."""
        embedded = self.embed(target.values, target.layout.positions, seed, site=1)
        return self.decoder(embedded, target.layout, memory, seed)

    def embed(self, tokens: Tensor, positions: Tensor, seed: Tensor | None, site: int) -> Tensor:
        """Returns token rows times sqrt(dim), plus sinusoidal positions (3.4 and 3.5), dropped out (5.4)."""
        return ops.embedding(
            tokens,
            self.embedding,
            positions,
            scale=math.sqrt(self.config.dim),
            dropout_p=self.config.dropout if self.training else 0.0,
            seed=seed,
            site=site,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Turns [..., dim] into the logits [..., vocab_size]."""
        return hidden @ self.embedding.t().to(hidden.dtype)

    def loss(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """Returns the cross-entropy [.] of the decoder's output [Nt, dim] against the next tokens [Nt]."""
        return ops.linear_cross_entropy(
            hidden, self.embedding, target, label_smoothing=label_smoothing, reduction=reduction
        )

    def projection_weights(self) -> dict[str, Tensor]:
        """Returns the parameters of attention's matrix products, which autocast rounds one by one, by name.

        The feed-forward network's are not among them: its operator takes them as they are, and gives fp32 gradients.
        """
        kinds = ("projection.weight", "projection.bias", "output.weight")
        return {name: parameter for name, parameter in self.named_parameters() if name.endswith(kinds)}

    def draw_seed(self) -> Tensor | None:
        """Draws one seed for a step's dropouts; none where nothing is dropped."""
        config = self.config
        drops = max(config.dropout, config.attention_dropout, config.activation_dropout) > 0
        return ops.draw_seed(self.embedding.device) if self.training and drops else None


class Encoder(nn.Module):
    """A stack of encoder layers (section 3.1, figure 1 left)."""

    def __init__(self, config: TransformerConfig, first_site: int) -> None:
        super().__init__()
        self.first_norm = LayerNorm(config) if config.norm_first else None
        sites = range(first_site, first_site + SITES_PER_LAYER * config.encoder_layers, SITES_PER_LAYER)
        self.layers = nn.ModuleList(EncoderLayer(config, site) for site in sites)

    def forward(self, x: Tensor, layout: Layout, seed: Tensor | None) -> Tensor:
        """Turns [N, dim] into [N, dim]."""
        state = State(x, x if self.first_norm is None else self.first_norm(x))
        for layer in self.layers:
            state = layer(state, layout, seed)
        return state.normed


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward network (section 3.1)."""

    def __init__(self, config: TransformerConfig, site: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, site)
        self.self_attention_norm = AddAndNorm(config, site + 1)
        self.feed_forward = FeedForward(config, site + 2)
        self.feed_forward_norm = AddAndNorm(config, site + 3)

    def forward(self, state: State, layout: Layout, seed: Tensor | None) -> State:
        state = self.self_attention_norm(self.self_attention(state.normed, layout, False, seed), state, seed)
        return self.feed_forward_norm(self.feed_forward(state.normed, seed), state, seed)


class Decoder(nn.Module):
    """A stack of decoder layers (section 3.1, figure 1 right); one matmul projects the memory for all of them."""

    def __init__(self, config: TransformerConfig, first_site: int) -> None:
        super().__init__()
        self.first_norm = LayerNorm(config) if config.norm_first else None
        self.memory_projection = linear(config.dim, *[config.dim] * (2 * config.decoder_layers))
        sites = range(first_site, first_site + SITES_PER_LAYER * config.decoder_layers, SITES_PER_LAYER)
        self.layers = nn.ModuleList(DecoderLayer(config, site) for site in sites)
        self.heads = config.heads

    def forward(self, x: Tensor, layout: Layout, memory: Ragged, seed: Tensor | None) -> Tensor:
        """Turns [Nt, dim] and the memory [Ns, dim] into [Nt, dim]."""
        state = State(x, x if self.first_norm is None else self.first_norm(x))
        for layer, key_value in zip(self.layers, self.project_memory(memory.values), strict=True):
            state = layer(state, layout, key_value, memory.layout, seed)
        return state.normed

    def project_memory(self, memory: Tensor) -> tuple[Tensor, ...]:
        """Turns the memory [Ns, dim] into each layer's keys and values of it, [Ns, 2, heads, dim / heads]."""
        projected = self.memory_projection(memory)
        return projected.view(len(memory), len(self.layers), 2, self.heads, -1).unbind(1)


class DecoderLayer(nn.Module):
    """Masked self-attention, attention over the encoder's output, then the feed-forward network (section 3.1)."""

    def __init__(self, config: TransformerConfig, site: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, site)
        self.self_attention_norm = AddAndNorm(config, site + 1)
        self.cross_attention = CrossAttention(config, site + 2)
        self.cross_attention_norm = AddAndNorm(config, site + 3)
        self.feed_forward = FeedForward(config, site + 4)
        self.feed_forward_norm = AddAndNorm(config, site + 5)

    def forward(
        self, state: State, layout: Layout, key_value: Tensor, memory_layout: Layout, seed: Tensor | None
    ) -> State:
        state = self.self_attention_norm(self.self_attention(state.normed, layout, True, seed), state, seed)
        attended = self.cross_attention(state.normed, layout, key_value, memory_layout, seed)
        state = self.cross_attention_norm(attended, state, seed)
        return self.feed_forward_norm(self.feed_forward(state.normed, seed), state, seed)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence over itself (section 3.2.2, figure 2); causal in the decoder (3.2.3)."""

    def __init__(self, config: TransformerConfig, site: int) -> None:
        super().__init__()
        self.heads, self.dropout, self.site = config.heads, config.attention_dropout, site
        self.projection = linear(config.dim, config.dim, config.dim, config.dim, gain=2**-0.5)
        self.output = Output(config.dim)

    def forward(self, x: Tensor, layout: Layout, is_causal: bool, seed: Tensor | None) -> Unbiased:
        """Turns [N, dim] into [N, dim]."""
        query, key, value = self.project(x)
        attended = ops.varlen_attention(
            query, key, value, layout.cu_seq, layout.cu_seq, layout.max_length, layout.max_length,
            self.dropout if self.training else 0.0, is_causal, seed=seed, site=self.site,
        )  # fmt: skip
        return self.output(attended.flatten(1))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Turns [N, dim] into query, key and value, [N, heads, dim / heads] each: views of one matmul's output."""
        return ops.split_heads(self.projection(x), 3, self.heads)


class CrossAttention(nn.Module):
    """Multi-head attention over the encoder's output (section 3.2.3), whose keys and values the stack projects."""

    def __init__(self, config: TransformerConfig, site: int) -> None:
        super().__init__()
        self.heads, self.dropout, self.site = config.heads, config.attention_dropout, site
        self.projection = linear(config.dim, config.dim, gain=2**-0.5)
        self.output = Output(config.dim)

    def forward(
        self, x: Tensor, layout: Layout, key_value: Tensor, memory_layout: Layout, seed: Tensor | None
    ) -> Unbiased:
        """Turns [Nt, dim], and keys and values [Ns, 2, heads, dim / heads], into [Nt, dim]."""
        key, value = ops.split_heads(key_value.flatten(1), 2, self.heads)
        attended = ops.varlen_attention(
            self.project(x), key, value, layout.cu_seq, memory_layout.cu_seq,
            layout.max_length, memory_layout.max_length,
            self.dropout if self.training else 0.0, seed=seed, site=self.site,
        )  # fmt: skip
        return self.output(attended.flatten(1))

    def project(self, x: Tensor) -> Tensor:
        """Turns [N, dim] into the query [N, heads, dim / heads]."""
        return self.projection(x).view(len(x), self.heads, -1)


class Output(nn.Module):
    """The last linear layer of attention (W^O of section 3.2.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = linear(dim, dim).parameters()

    def forward(self, x: Tensor) -> Unbiased:
        return Unbiased(F.linear(x, self.weight), self.bias)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, at each position alike (section 3.3, equation 2)."""

    def __init__(self, config: TransformerConfig, site: int) -> None:
        super().__init__()
        self.activation, self.dropout, self.site = config.activation, config.activation_dropout, site
        self.inner = linear(config.dim, config.ffn_dim)
        self.outer = linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor, seed: Tensor | None) -> Unbiased:
        product = ops.feed_forward(
            x,
            self.inner.weight,
            self.inner.bias,
            self.outer.weight,
            None,
            self.activation,
            self.dropout if self.training else 0.0,
            seed=seed,
            site=self.site,
        )
        return Unbiased(product, self.outer.bias)


class AddAndNorm(nn.Module):
    """A sublayer's output, dropped out, added to the residual stream and normalised, in one pass (section 5.4)."""

    def __init__(self, config: TransformerConfig, site: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.bias = nn.Parameter(torch.zeros(config.dim))
        self.eps, self.dropout, self.norm_first, self.site = config.norm_eps, config.dropout, config.norm_first, site

    def forward(self, sublayer: Unbiased, state: State, seed: Tensor | None) -> State:
        normed, stream = ops.residual_layer_norm(
            sublayer.product,
            state.stream,
            self.weight,
            self.bias,
            self.eps,
            self.dropout if self.training else 0.0,
            x_bias=sublayer.bias,
            seed=seed,
            site=self.site,
        )
        return State(stream if self.norm_first else normed, normed)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the configured width."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.dim, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def linear(inputs: int, *outputs: int, gain: float = 1.0) -> nn.Linear:
    """Makes a linear layer for one or several projections side by side, each Xavier-uniform by itself; biases are 0."""
    layer = nn.Linear(inputs, sum(outputs))
    for weight in layer.weight.split(outputs):
        nn.init.xavier_uniform_(weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
