"""Hugging Face's models: what of them runs fused, found by what a module is and does, not by the model's name.

Imported only when a model of transformers is given. The one thing that it changes of the process is a name, "tfm", in
transformers' tables of attention functions and masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.nn import Module

from tfm.patching.fusion import Fused
from tfm.patching.huggingface import attention
from tfm.patching.huggingface.feed_forward import FusedFirstHalf, FusedGatedFeedForward, gated_parts, plain_half
from tfm.patching.huggingface.implementation import accelerate_attention, restore_implementation
from tfm.patching.huggingface.norm import FusedRMSNorm, rounding_of
from tfm.patching.huggingface.residual import FusedOutput, is_output

__all__ = ["Found", "accelerate_attention", "found_in", "restore_implementation"]

attention.register()


class Found(NamedTuple):
    """What a module would become: the kind of work, the forward and its options."""

    what: str
    forward: type[Fused]
    options: dict[str, Any]


def _norm(module: Module) -> Found | None:
    found = rounding_of(module)
    return found and Found("norm", FusedRMSNorm, {"rounding": found[0], "eps_name": found[1]})


def _gated(module: Module) -> Found | None:
    parts = gated_parts(module)
    return parts and Found("feed_forward", FusedGatedFeedForward, {"parts": parts})


def _plain(module: Module) -> Found | None:
    plain = plain_half(module)
    return plain and Found("feed_forward", FusedFirstHalf, {"plain": plain})


def _output(module: Module) -> Found | None:
    return Found("residual", FusedOutput, {}) if is_output(module) else None


# The first that knows a module has it.
FINDERS: tuple[Callable[[Module], Found | None], ...] = (_norm, _gated, _plain, _output)


def found_in(module: Module) -> Found | None:
    """Returns what a module of transformers would become; None where nothing is known for it."""
    return next(filter(None, (finder(module) for finder in FINDERS)), None)
