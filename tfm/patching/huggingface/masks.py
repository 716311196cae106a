"""Masks for the attention named "tfm": of keys where nothing else is said, dense only where they must be.

transformers asks a function for each model's mask and hands what it returns to every attention. Stock's is dense,
[B, 1, Sq, Sk], or None. Ours is

- None: nothing is padding;
- bool [B, 1, 1, Sk]: which keys to attend to, all that there is to say, as stock would broadcast it;
- uint8 [B, 1, 1, Sk]: the same, besides the causality and the window that the module has. No mask of stock's is uint8;
- bool [B, 1, Sq, Sk], stock's own: all that there is to say, where it is more than that (packed sequences, overlays,
  block ids, static caches, windows without direction).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask, prepare_padding_mask, sdpa_mask

NAME = "tfm"

# Models that read their masks themselves, as stock's eager attention has them: NLLB-MoE's router.
EAGER_MASKS = frozenset({"nllb-moe"})


def typed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Tensor | None:
    """Returns the mask of the module docstring, for transformers' AttentionMaskInterface.

    Args:
        batch_size, q_length, kv_length: of the scores.
        q_offset, kv_offset: positions of the first query and the first key.
        attention_mask: bool [B, seen tokens], False for padding.
        local_size: how many keys a query sees, itself included; None for all.
        allow_is_causal_skip: nothing but causality, window and padding is asked for.
        allow_is_bidirectional_skip: nothing but window and padding.
        **others: what the mask functions of transformers take besides.
    """
    config = others.get("config")
    given: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "attention_mask": attention_mask, "local_size": local_size,
    }  # fmt: skip
    if getattr(config, "model_type", "") in EAGER_MASKS:
        given |= {"allow_is_bidirectional_skip": allow_is_bidirectional_skip}
        return eager_mask(**given, allow_is_causal_skip=allow_is_causal_skip, **others)
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    windowed = local_size is None or kv_length < local_size or _slides(others.get("mask_function"), local_size)
    is_plain = (allow_is_causal_skip and aligned and windowed) or (allow_is_bidirectional_skip and local_size is None)
    if not is_plain:
        return sdpa_mask(**given, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **others)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    # Without a mask a module says itself whether it is causal, and stock asks it only of as many queries as keys.
    says_itself = not allow_is_causal_skip or q_length in (1, kv_length)
    if padding is None:
        if says_itself:
            return None
        padding = torch.ones(batch_size, kv_offset + kv_length, dtype=torch.bool, device=others.get("device"))
    padding = padding[:, kv_offset : kv_offset + kv_length]
    if says_itself and _is_readable(padding) and bool(padding.all()):
        return None
    padding = padding[:, None, None, :]
    return padding.to(torch.uint8) if allow_is_causal_skip else padding


def dense_mask(mask: Tensor | None, queries: int, keys: int, is_causal: bool, window: int | None, device: Any) -> Any:
    """Returns what stock's attention takes in place of a mask of ours, bool [B or 1, 1, Sq, Sk] or None.

    Args:
        mask: of the module docstring.
        queries, keys: lengths; the last query stands beside the last key.
        is_causal, window: what holds besides; a window counts a query's own key, None for all.
        device: where the queries are.
    """
    if not is_causal:
        return mask
    place = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    visible = key <= place
    if window is not None:
        visible &= key > place - window
    dense = visible[None, None]
    return dense if mask is None else dense & mask.bool()


def register() -> None:
    """Makes the masks known to transformers under their name, which no other place is told."""
    AttentionMaskInterface.register(NAME, typed_mask)


def _slides(mask_function: Any, size: int) -> bool:
    """Tells whether a mask of a local size is a window that slides, not one of chunks side by side (Llama 4).

    A query right behind the first `size` keys sees all of them but the first through a window, and none in chunks.
    """
    if size == 1:
        return True
    if mask_function is None or torch.compiler.is_compiling():
        return False
    batch, head, query, key = (torch.tensor(place) for place in (0, 0, size, 1))
    try:
        return bool(mask_function(batch, head, query, key))
    except Exception:
        # It reads what lies on a device.
        return False


def _is_readable(mask: Tensor) -> bool:
    """Tells whether looking at values costs nothing: on a CPU, outside of traces and compiled code."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
