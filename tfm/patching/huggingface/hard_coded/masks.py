"""Masks of models whose attention is hard-coded: of keys besides causality, not dense, while all of it runs fused.

The attention of such a class takes a dense mask and knows nothing of another. So the model, once all its attention runs
fused, gets a copy of its forward in which transformers' mask functions are ours. They give what they gave, or

- uint8 [B, Sk]: the keys that are no padding, besides causality;
- uint8 [0]: causality alone;
- bool [B, 1, 1, Sk], or None: the keys that are no padding, without causality;
- bool [B, 1, Sq, Sk]: all that there is to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import masking_utils

from tfm.patching.fusion import FUSION, Fused, global_names, plain_kind, rebound, why_no_kernel
from tfm.patching.huggingface.hard_coded.adapter import runs_fused
from tfm.patching.huggingface.masks import NAME

CAUSAL, BIDIRECTIONAL = "create_causal_mask", "create_bidirectional_mask"


class _Named:
    """A config, but for the attention that it names: the masks hang on that."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def create_causal_mask(config: Any, *args: Any, **named: Any) -> Any:
    """Returns a mask of the module docstring in place of transformers' function of this name."""
    inputs = _inputs(*args, **named)
    if why_no_kernel("attention", inputs):
        return masking_utils.create_causal_mask(config, *args, **named)
    # Falcon asks for a dense mask, as it adds another to it.
    named.pop("allow_is_causal_skip", None)
    named_config: Any = _Named(config)
    mask: Any = masking_utils.create_causal_mask(named_config, *args, **named)
    if mask is None:
        return torch.empty(0, dtype=torch.uint8, device=inputs.device)
    return mask[:, 0, 0] if mask.dtype == torch.uint8 else mask


def create_bidirectional_mask(config: Any, *args: Any, **named: Any) -> Any:
    """Returns a mask of the module docstring in place of transformers' function of this name."""
    if why_no_kernel("attention", _inputs(*args, **named)):
        return masking_utils.create_bidirectional_mask(config, *args, **named)
    named_config: Any = _Named(config)
    return masking_utils.create_bidirectional_mask(named_config, *args, **named)


def _inputs(*args: Any, **named: Any) -> Tensor:
    """Returns the embedded tokens, the only floating-point tensor of three dimensions among the arguments' first."""
    return next(x for x in (*args, *named.values()) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3)


FUNCTIONS = {CAUSAL: create_causal_mask, BIDIRECTIONAL: create_bidirectional_mask}


class FusedMasks(Fused):
    """A model that makes masks for attention that runs fused."""

    @classmethod
    def attributes(cls, kind: type[Module], **options: Any) -> dict[str, Any]:
        """Returns the forward that finds our mask functions."""
        return {"_forward": staticmethod(rebound(kind.forward, FUNCTIONS))}

    _forward: Callable[..., Any]

    def forward(self, *args: Any, **named: Any) -> Any:
        """Runs the model's own forward, or its copy while all the attention that reads its masks runs fused."""
        if all(map(runs_fused, getattr(self, FUSION).parts)):
            return self._forward(self, *args, **named)
        return self._plain_kind.forward(self, *args, **named)


def makes_masks(model: Module) -> bool:
    """Tells whether a model's forward asks transformers for masks."""
    return not global_names(plain_kind(model).forward).isdisjoint(FUNCTIONS)


def rules(mask: Tensor | None, queries: int, keys: int) -> dict[str, Any]:
    """Returns what a mask says as arguments of `tfm.ops.attention`; the last query stands beside the last key."""
    if mask is None:
        return {}
    if mask.dtype != torch.uint8:
        if mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
            return {"key_mask": mask[:, 0, 0]}
        return {"attn_mask": mask}
    # One query sees all keys before it.
    causal = {"is_causal": True, "query_start": keys - queries} if queries > 1 else {}
    return causal if mask.dim() == 1 else {"key_mask": mask.bool(), **causal}


def is_causal(mask: Tensor | None) -> bool:
    """Tells whether a mask leaves causality to the attention."""
    return mask is not None and mask.dtype == torch.uint8
