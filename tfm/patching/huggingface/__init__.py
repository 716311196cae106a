"""Hugging Face's models: what of them runs fused, found by what a module is and does, not by the model's name.

Imported only when a model of transformers is given. The one thing that it changes of the process is a name, "tfm", in
transformers' tables of attention functions and masks.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.nn import CrossEntropyLoss, Module

from tfm.patching.fusion import Change
from tfm.patching.huggingface import (
    attention,
    cross_entropy,
    embeddings,
    experts,
    feed_forward,
    gated_recurrence,
    hard_coded,
    layers,
    norm,
    residual,
    state_space,
    time_mix,
)
from tfm.patching.huggingface.hard_coded import accelerate_masks
from tfm.patching.huggingface.implementation import accelerate_attention, restore_implementation
from tfm.patching.huggingface.loss import heads_of
from tfm.patching.huggingface.packing import pack_stacks

__all__ = [
    "accelerate_attention",
    "accelerate_masks",
    "change_of",
    "heads_of",
    "pack_stacks",
    "restore_implementation",
]

attention.register()

# The first that knows a module has it.
FINDERS: tuple[Callable[[Module], Change | None], ...] = (
    norm.change_of,
    embeddings.change_of,
    layers.change_of,
    feed_forward.change_of,
    residual.change_of,
    hard_coded.change_of,
    experts.change_of,
    time_mix.change_of,
    gated_recurrence.change_of,
    state_space.change_of,
    cross_entropy.change_of,
)


def change_of(module: Module) -> Change | None:
    """Returns what a module of transformers, or the loss that its models keep, would become; None for all others."""
    if type(module) is CrossEntropyLoss:
        return cross_entropy.change_of(module)
    if type(module).__module__.split(".")[0] != "transformers":
        return None
    return next(filter(None, (finder(module) for finder in FINDERS)), None)
