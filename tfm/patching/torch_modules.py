"""torch.nn's Transformer modules and tfm.nn's: which becomes which, by its class alone.

The object stays: its parameters, buffers, hooks and flags, and whatever points at it, optimisers included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from tfm import nn
from tfm.nn.fusible import DECODER_CHILDREN, ENCODER_CHILDREN, why_layer_unfusible
from tfm.patching.fusion import Change
from tfm.patching.replay import is_graphed

PAIRS: dict[type[Module], type[Module]] = {
    torch.nn.Transformer: nn.Transformer,
    torch.nn.TransformerEncoder: nn.TransformerEncoder,
    torch.nn.TransformerDecoder: nn.TransformerDecoder,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
}
# Set on each object that changed, so that copies of a model know it too.
MARK = "_accelerated_by_tfm"

ORIGINALS = {ours: theirs for theirs, ours in PAIRS.items()}

# What accelerate(graphs=True) has replay graphs, unless it is inside another of them.
STACKS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def change_of(module: Module) -> Change | None:
    """Returns what a module of torch.nn's would become; None for any other."""
    ours = PAIRS.get(type(module))
    if ours is None:
        return None
    what = {nn.MultiheadAttention: "attention", nn.LayerNorm: "norm", nn.RMSNorm: "norm"}.get(ours, "layer")
    return Change(what, f"tfm.nn.{ours.__name__}", _swap)


def _swap(module: Module) -> None:
    module.__class__ = PAIRS[type(module)]
    setattr(module, MARK, True)


def why_left(module: Module) -> str:
    """Says why a module that one might expect to change does not; empty where there is nothing to say."""
    base = next((theirs for theirs in PAIRS if isinstance(module, theirs)), None)
    if base is None or isinstance(module, tuple(ORIGINALS)):
        return ""
    if is_graphed(module):
        return f"a graphed torch.nn.{base.__name__}: call accelerate() before graphed()"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return f"a torch.nn.{base.__name__} with parametrizations"
    if type(module) is not base:
        return f"a subclass of torch.nn.{base.__name__}, whose own code might be lost"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself"
    dimensions = len(getattr(module, "normalized_shape", ()))
    return f"normalises over {dimensions} dimensions, which torch does" if dimensions > 1 else ""


def note(module: Any) -> str:
    """Says what of a layer of tfm.nn does not run fused, and why; empty where all does."""
    expected = {nn.TransformerEncoderLayer: ENCODER_CHILDREN, nn.TransformerDecoderLayer: DECODER_CHILDREN}
    reason = why_layer_unfusible(module, expected[type(module)]) if type(module) in expected else ""
    return f"calls its children one by one, unfused: {reason}" if reason else ""
