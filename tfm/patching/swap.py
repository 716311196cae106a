"""torch.nn's Transformer modules to tfm.nn's and back, by changing the class of each object.

The object stays: its parameters, buffers, hooks and flags, and whatever points at it, optimisers included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module

from tfm import nn
from tfm.nn.fusible import DECODER_CHILDREN, ENCODER_CHILDREN, why_layer_unfusible
from tfm.patching.replay import graphed, is_graphed, plain_class, ungraph
from tfm.patching.report import Left, Report, Swapped

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
ORIGINALS = {ours: theirs for theirs, ours in PAIRS.items()}

# What accelerate(graphs=True) has replay graphs, unless it is inside another of them.
STACKS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)

# Set on each object that accelerate() changed, so that copies of a model know it too.
MARK = "_accelerated_by_tfm"


def accelerate(model: Module, *, graphs: bool = False) -> Report:
    """Puts tfm.nn's layers in place of torch.nn's everywhere inside `model`, in place.

    Only modules whose class is exactly torch.nn's change, by their `__class__`; nothing is copied, and state_dict,
    hooks and optimisers stay as they are. User subclasses, TorchScript and Hugging Face modules are left. A second call
    changes nothing more.

    Args:
        model: any module.
        graphs: have each Transformer, stack or layer, the outermost, replay CUDA graphs on a GPU: see `tfm.graphed`.

    Returns:
        What was replaced, and what was left and why; print it.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    _check_module("accelerate", model)
    swapped, left, unchanged = [], [], 0
    for name, module in _walk(model):
        kind = type(module)
        if plain_class(module) in ORIGINALS:
            unchanged += 1
            continue
        reason = _why_left(module)
        if reason:
            left.append(Left(name, kind.__name__, reason))
        elif kind in PAIRS:
            module.__class__ = PAIRS[kind]
            setattr(module, MARK, True)
            swapped.append((name, module))
    # Only now, as a layer's children have all changed.
    done = tuple(Swapped(name, f"tfm.nn.{type(module).__name__}", _note(module)) for name, module in swapped)
    stacks = dict(_outermost_stacks(model)) if graphs else {}
    for module in stacks.values():
        graphed(module)
    return Report("replaced", done, tuple(left), unchanged, tuple(stacks))


def restore(model: Module) -> Report:
    """Undoes what accelerate() and graphed() did to `model`; modules that were made as tfm.nn's stay.

    Returns:
        What was restored; print it.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    _check_module("restore", model)
    swapped, left = [], []
    stacks = {name: module for name, module in model.named_modules() if is_graphed(module)}
    for module in stacks.values():
        ungraph(module)
    for name, module in _walk(model):
        kind = type(module)
        if MARK in module.__dict__:
            if kind not in ORIGINALS:
                left.append(Left(name, kind.__name__, "its class was changed again after accelerate()"))
                continue
            module.__class__ = ORIGINALS[kind]
            delattr(module, MARK)
            swapped.append(Swapped(name, f"torch.nn.{kind.__name__}"))
        elif kind in ORIGINALS:
            left.append(Left(name, kind.__name__, "made as a tfm.nn module, not by accelerate()"))
    return Report("restored", tuple(swapped), tuple(left), graphed=tuple(stacks))


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")


def _walk(module: Module, name: str = "", seen: set[Module] | None = None) -> Iterator[tuple[str, Module]]:
    """Yields each module once, under its first name; what is inside foreign modules stays out."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    # Children are listed before the caller may change the module's class.
    children = [] if _foreign(module) else list(module._modules.items())
    yield name, module
    for child_name, child in children:
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def _outermost_stacks(module: Module, name: str = "") -> Iterator[tuple[str, Module]]:
    """Yields the modules that accelerate(graphs=True) has replay graphs, and do not yet."""
    if is_graphed(module) or _foreign(module):
        return
    if type(module) in STACKS and "forward" not in vars(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_stacks(child, f"{name}.{child_name}" if name else child_name)


def _foreign(module: Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript, it no longer runs Python"
    if type(module).__module__.split(".")[0] == "transformers":
        return "a Hugging Face module: accelerate() serves torch.nn's Transformer modules only"
    return ""


def _why_left(module: Module) -> str:
    """Says why a module that one might expect to change does not; empty where there is nothing to say."""
    reason = _foreign(module)
    if reason:
        return reason
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


def _note(module: Any) -> str:
    expected = {nn.TransformerEncoderLayer: ENCODER_CHILDREN, nn.TransformerDecoderLayer: DECODER_CHILDREN}
    reason = why_layer_unfusible(module, expected[type(module)]) if type(module) in expected else ""
    return f"calls its children one by one, unfused: {reason}" if reason else ""
