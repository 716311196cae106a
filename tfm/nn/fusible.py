"""Tells which modules are as torch made them, so that their parameters may be used without calling them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from tfm.nn.attention import MultiheadAttention
from tfm.nn.norm import LayerNorm, RMSNorm

ATTENTION = (MultiheadAttention, torch.nn.MultiheadAttention)
LINEAR = (torch.nn.Linear, NonDynamicallyQuantizableLinear)
NORM = (LayerNorm, torch.nn.LayerNorm)
DROPOUT = (torch.nn.Dropout,)
TOKEN_WISE_NORM = (*NORM, RMSNorm, torch.nn.RMSNorm)
# The methods that torch's layers consist of, as torch made them (encoder layers have no _mha_block).
BLOCKS = {
    name: tuple(
        getattr(layer, name, None) for layer in (torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
    )
    for name in ("_sa_block", "_mha_block", "_ff_block")
}
PLAIN_PARAMETERS = (torch.nn.Parameter, torch.Tensor, type(None))

ENCODER_CHILDREN = {
    "self_attn": ATTENTION,
    "linear1": LINEAR,
    "linear2": LINEAR,
    "norm1": NORM,
    "norm2": NORM,
    "dropout": DROPOUT,
    "dropout1": DROPOUT,
    "dropout2": DROPOUT,
}
DECODER_CHILDREN = {**ENCODER_CHILDREN, "multihead_attn": ATTENTION, "norm3": NORM, "dropout3": DROPOUT}


def why_layer_unfusible(layer: torch.nn.Module, expected: dict[str, tuple[type, ...]]) -> str:
    """Tells why a layer must call its children, as torch does, one by one; empty where their parameters suffice."""
    if _has_any_global_hook():
        return "hooks for all modules are set"
    for name, torchs in BLOCKS.items():
        if name in layer.__dict__ or getattr(type(layer), name, None) not in torchs:
            return f"has a {name} of its own"
    self_attn: Any = layer._modules["self_attn"]
    for name, types in expected.items():
        child: Any = layer._modules[name]
        reason = _how_altered(child, types)
        if reason:
            return f"{name} {reason}"
        if types is NORM and len(child.normalized_shape) != 1:
            return f"{name} normalises over several dimensions"
        if types is ATTENTION:
            plain = child._qkv_same_embed_dim and child.bias_k is None and not child.add_zero_attn
            if not plain or child.batch_first != self_attn.batch_first:
                return f"{name} is not the attention that torch gives such a layer"
    return ""


def why_stack_unfusible(layers: torch.nn.ModuleList, norm: Any, layer_type: type) -> str:
    """Tells why a stack must call its layers as modules, on padded tensors; empty where it may reach inside them."""
    children = DECODER_CHILDREN if "multihead_attn" in layers[0]._modules else ENCODER_CHILDREN
    for index, layer in enumerate(layers):
        reason = _how_altered(layer, (layer_type,)) or why_layer_unfusible(layer, children)
        if reason:
            return f"layers.{index} {reason}"
    reason = _how_altered(norm, TOKEN_WISE_NORM) if norm is not None else ""
    if not reason and norm is not None and len(norm.normalized_shape) != 1:
        reason = "normalises over several dimensions"
    return f"norm {reason}" if reason else ""


def own_calls(module: torch.nn.Module) -> str:
    """Tells what a call of `module` does besides its class's forward; empty where nothing."""
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if module._compiled_call_impl is not None:
        return "is compiled by itself"
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return "carries hooks" if hooks else ""


def _how_altered(module: torch.nn.Module, types: tuple[type, ...]) -> str:
    """Tells how a module differs from those that torch made of `types`; empty where it does not."""
    if type(module) not in types:
        return f"is a {type(module).__name__}"
    for name, parameter in module._parameters.items():
        if type(parameter) not in PLAIN_PARAMETERS:
            return f"holds its {name} as a {type(parameter).__name__}"
    return own_calls(module)
