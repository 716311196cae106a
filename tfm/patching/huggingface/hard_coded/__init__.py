"""Attention of classes that compute it themselves, without transformers' AttentionInterface: a table by their names.

A class is served if on a small module of its own it gives what its adapter gives; else it is left, with the reason.
"""

from __future__ import annotations

from torch.nn import Module
from transformers import PreTrainedModel

from tfm.patching.fusion import FUSION, MODEL, Change, fuse, fusing, fusion_of, plain_kind
from tfm.patching.huggingface.hard_coded import (
    big_bird,
    deberta,
    falcon,
    flaubert,
    gpt_neo,
    gptj,
    longformer,
    xlnet,
)
from tfm.patching.huggingface.hard_coded.adapter import Adapter, runs_fused, why_left
from tfm.patching.huggingface.hard_coded.masks import FusedMasks, makes_masks

__all__ = ["accelerate_masks", "change_of"]

FAMILIES = (gptj, gpt_neo, flaubert, falcon, big_bird, longformer, deberta, xlnet)
ADAPTERS: dict[str, Adapter] = {name: adapter for family in FAMILIES for name, adapter in family.ADAPTERS.items()}


def change_of(module: Module) -> Change | None:
    """Returns what hard-coded attention would become; None for any other module."""
    adapter = ADAPTERS.get(type(module).__name__)
    if adapter is None:
        return None
    return fusing("attention", adapter.forward)._replace(why_left=why_left(module, adapter))


def accelerate_masks(model: Module) -> None:
    """Has the models inside `model` make no dense masks whose hard-coded attention, all of it, runs fused."""
    for inner in model.modules():
        if not isinstance(inner, PreTrainedModel) or fusion_of(inner) is not None or not makes_masks(inner):
            continue
        parts = tuple(part for part in inner.modules() if _reads_masks(part))
        if parts and all(map(runs_fused, parts)):
            fuse(inner, MODEL, FusedMasks)
            vars(inner)[FUSION].parts = parts


def _reads_masks(module: Module) -> bool:
    adapter = ADAPTERS.get(plain_kind(module).__name__)
    return adapter is not None and adapter.reads_masks
