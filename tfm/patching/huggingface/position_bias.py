"""T5's position bias by its distances, [H, 2 R + 1], where its own is dense, [1, H, Sq, Sk].

T5's attention makes a bias in its first layer, and hands it to the next ones with what it returns; so whatever
`compute_bias` gives arrives at `attend`. Attention to another sequence has none, and makes zeros of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding

from tfm import ops
from tfm.patching.fusion import plain_kind, why_altered


def why_dense(module: Any) -> str:
    """Says why the bias of a T5 attention is dense; empty where it is by distance, or where there is none."""
    if not getattr(module, "has_relative_attention_bias", False):
        return ""
    return why_altered("relative_attention_bias", module._modules.get("relative_attention_bias"), (Embedding,))


def compute_bias(
    self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0
) -> Tensor:
    """Returns the bias by distance, for queries beside the last keys; dense where they lie elsewhere."""
    aligned = isinstance(past_seen_tokens, int) and past_seen_tokens + query_length == key_length
    if not aligned or why_dense(self):
        return plain_kind(self).compute_bias(self, query_length, key_length, device, past_seen_tokens)  # type: ignore[attr-defined]
    return by_distance(self)


def by_distance(module: Any) -> Tensor:
    """Returns the bias [H, 2 R + 1] of a T5 attention, for `relative_bias` of tfm.ops.attention."""
    return ops.t5_bias(
        module.relative_attention_bias.weight, module.relative_attention_max_distance, not module.is_decoder
    )


def no_bias(module: Any) -> Tensor:
    """Returns what stands for no bias at all, [H, 0], among those by distance."""
    return torch.empty((module.n_heads, 0))


def split_bias(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the bias by distance and the dense one, of which at most one is there."""
    if bias is None or bias.dim() != 2:
        return None, bias
    return (bias if bias.numel() else None), None


def dense_bias(bias: Tensor, queries: int, keys: int) -> Tensor:
    """Returns [1, H, Sq, Sk] of a bias by distance, the last query beside the last key."""
    farthest = bias.shape[1] // 2
    place = torch.arange(keys - queries, keys, device=bias.device)[:, None]
    distance = torch.arange(keys, device=bias.device) - place
    return bias[:, distance.clamp(-farthest, farthest) + farthest][None]


def has_position_bias(module: Any) -> bool:
    """Tells whether a module makes its position bias as T5's attention does, by a trial of the bias itself."""
    kind: Any = plain_kind(module)
    if not hasattr(kind, "compute_bias") or not isinstance(getattr(module, "n_heads", None), int):
        return False
    if not getattr(module, "has_relative_attention_bias", False):
        return hasattr(module, "relative_attention_max_distance")
    if why_dense(module):
        return False
    far = module.relative_attention_max_distance + 5
    try:
        with torch.no_grad():
            # One query amid its keys sees every distance.
            theirs = kind.compute_bias(module, 1, 2 * far, past_seen_tokens=far)
            ours = by_distance(module)
    except Exception:
        return False
    distance = (torch.arange(2 * far, device=ours.device) - far).clamp(5 - far, far - 5) + far - 5
    return torch.equal(theirs, ours[:, distance][None, :, None])
