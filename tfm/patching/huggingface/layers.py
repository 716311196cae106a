"""Layers whose residual connections lie open in their forward: dropout, addition and norm in one pass each.

A layer is known by the text of its class's forward, so that one forward of ours serves all families that copied it, and
one that transformers changes is left alone. Attention, and whatever a user has altered, is still called as a module.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module
from torch.nn.functional import dropout

from tfm import nn, ops
from tfm.patching.fusion import Change, Fused, fusing, plain_kind, why_altered, why_no_kernel
from tfm.patching.huggingface.feed_forward import activation_of
from tfm.patching.huggingface.packing import PackedMask

NORMS = (LayerNorm, nn.LayerNorm)


class Template(NamedTuple):
    """What a known forward does.

    Attributes:
        forward: ours.
        is_pre_norm: norms stand before attention and network, not behind their residual connections.
        norms: the names of the norms.
    """

    forward: type[Fused]
    is_pre_norm: bool
    norms: tuple[str, ...]


class OpenLayer(Fused):
    """What the layers share, which all have `dropout` as a number, fc1, activation_fn, activation_dropout and fc2."""

    _template: Template

    def why_not(self, x: Tensor) -> str:
        """Says why a call does not run fused; empty where it does."""
        for name in self._template.norms:
            reason = why_altered(name, self._modules.get(name), NORMS)
            if reason:
                return reason
        if x.dtype == torch.float16:
            return "results in fp16 are clamped"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast has the norm in fp32"
        return why_no_kernel("residual_layer_norm", x)

    def added(self, x: Tensor, residual: Tensor, norm: Any, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns norm(h) and h = residual + dropout(x + bias)."""
        dropout_p = self.dropout if self.training else 0.0
        return ops.residual_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout_p, x_bias=bias)

    def fed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the network's result, and the bias that is still to be added."""
        first, second, activation = self.fc1, self.fc2, activation_of(self.activation_fn)
        reasons = (why_altered("fc1", first, (Linear,)), why_altered("fc2", second, (Linear,)))
        dropout_p = self.activation_dropout if self.training else 0.0
        if any(reasons) or activation is None or self.activation_fn._forward_hooks:
            return second(dropout(self.activation_fn(first(x)), dropout_p)), None
        x = ops.feed_forward(x, first.weight, first.bias, second.weight, None, activation, dropout_p)
        return x, second.bias

    def run(self, x: Tensor, attentions: Sequence[tuple[Callable[[Tensor], Tensor], Any]]) -> Tensor:
        """Runs attentions, each with its norm, and the network behind them."""
        final = self.final_layer_norm
        if not self._template.is_pre_norm:
            for attention, norm in attentions:
                x, _ = self.added(attention(x), x, norm)
            made, bias = self.fed_forward(x)
            return self.added(made, x, final, bias)[0]
        y, following = attentions[0][1](x), [norm for _, norm in attentions[1:]]
        for (attention, _), norm in zip(attentions, (*following, final), strict=True):
            y, x = self.added(attention(y), x, norm)
        made, bias = self.fed_forward(y)
        made = made if bias is None else made + bias
        return x + dropout(made, self.dropout, self.training)


class FusedEncoderLayer(OpenLayer):
    """Self-attention and feed-forward network, of BART's and Pegasus's kind."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """Returns the shape of `hidden_states` [B, S, H]; [1, N, H] where the mask is of packed tokens."""
        if isinstance(attention_mask, PackedMask):
            hidden_states = attention_mask.packed(hidden_states)
        reason = self.why_not(hidden_states)
        if reason:
            return self.plainly(reason, hidden_states, attention_mask, **kwargs)
        self.fusedly()

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]

        return self.run(hidden_states, [(attend, self.self_attn_layer_norm)])


class FusedDecoderLayer(OpenLayer):
    """Self-attention, attention to an encoder where there is one, and feed-forward network."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the shape of `hidden_states` [B, S, H]."""
        reason = self.why_not(hidden_states)
        if reason:
            return self.plainly(
                reason, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                past_key_values, use_cache, **kwargs,
            )  # fmt: skip
        self.fusedly()

        def attend(x: Tensor) -> Tensor:
            found = self.self_attn(x, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
            return found[0]

        def attend_to_encoder(x: Tensor) -> Tensor:
            found = self.encoder_attn(
                x, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
            return found[0]

        attentions = [(attend, self.self_attn_layer_norm)]
        if encoder_hidden_states is not None:
            attentions.append((attend_to_encoder, self.encoder_attn_layer_norm))
        return self.run(hidden_states, attentions)


ENCODER = ("self_attn_layer_norm", "final_layer_norm")
DECODER = (*ENCODER, "encoder_attn_layer_norm")
POST_ENCODER = Template(FusedEncoderLayer, False, ENCODER)
PRE_ENCODER = Template(FusedEncoderLayer, True, ENCODER)
POST_DECODER = Template(FusedDecoderLayer, False, DECODER)
PRE_DECODER = Template(FusedDecoderLayer, True, DECODER)

# By the digest of the forward's text, as transformers 5.17 to 5.23 have it.
KNOWN: dict[str, Template] = {
    "227da81e049339a2": POST_ENCODER,  # BART, Marian, PLBart, Blenderbot small
    "67fcf1df6f735c30": POST_DECODER,
    "640e9e5a1ecfea4d": PRE_ENCODER,  # MBart, Pegasus, M2M100, Blenderbot, Whisper, Speech2Text
    "bd200d330569af8f": PRE_DECODER,  # MBart, Pegasus, M2M100, Blenderbot
    "a10b76bb1a4a2666": PRE_DECODER,  # Whisper, Speech2Text, XGLM
}


def digest(function: Any) -> str:
    """Returns a digest of a function's text, without names of types, documentation and layout."""
    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    tree.returns, tree.decorator_list = None, []
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


@cache
def template_of(kind: Any) -> Template | None:
    """Returns what the forward of a class is known to do; None where it is not known."""
    try:
        return KNOWN.get(digest(kind.forward))
    except (OSError, TypeError, SyntaxError):
        return None  # without its text


def change_of(module: Module) -> Change | None:
    """Returns what a layer would become; None for any other module."""
    kind: Any = plain_kind(module)
    if "Layer" not in kind.__name__:
        return None
    found = template_of(kind)
    return found and fusing("residual", found.forward, _template=found)
