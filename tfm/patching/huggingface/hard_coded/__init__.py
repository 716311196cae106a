"""Attention of classes that compute it themselves, without transformers' AttentionInterface: a table by their names.

A class is served if on a small module of its own it gives what its adapter gives; else it is left, with the reason.
"""

from __future__ import annotations

from torch.nn import Module
from transformers import PreTrainedModel

from tfm.patching.fusion import FUSION, MODEL, Change, fuse, fusing, fusion_of, plain_kind
from tfm.patching.huggingface.hard_coded import falcon, flaubert, gpt_neo, gptj
from tfm.patching.huggingface.hard_coded.adapter import Adapter, why_different
from tfm.patching.huggingface.hard_coded.masks import FusedMasks, makes_masks

__all__ = ["accelerate_masks", "change_of"]

ADAPTERS: dict[str, Adapter] = gptj.ADAPTERS | gpt_neo.ADAPTERS | flaubert.ADAPTERS | falcon.ADAPTERS


def change_of(module: Module) -> Change | None:
    """Returns what hard-coded attention would become; None for any other module."""
    adapter = ADAPTERS.get(type(module).__name__)
    if adapter is None:
        return None
    reason = adapter.why_left(module) or why_different(type(module), adapter)
    return fusing("attention", adapter.forward)._replace(why_left=reason)


def accelerate_masks(model: Module) -> None:
    """Has the models inside `model` make no dense masks whose hard-coded attention, all of it, runs fused."""
    for inner in model.modules():
        if not isinstance(inner, PreTrainedModel) or fusion_of(inner) is not None or not makes_masks(inner):
            continue
        parts = tuple(part for part in inner.modules() if plain_kind(part).__name__ in ADAPTERS)
        if parts and all(fusion_of(part) is not None for part in parts):
            fuse(inner, MODEL, FusedMasks)
            vars(inner)[FUSION].parts = parts
