"""Attention of one query a sequence over a cache whose rows share their past ("Attention Is All You Need", 3.2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.reference.attention import attention


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    parents: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    scale: float,
) -> Tensor:
    """Computes tfm.ops.decode_attention, which has checked the arguments. Copies what the rows attend to."""
    rows, capacity = len(query), key_cache.shape[1]
    if rows == 0 or capacity == 0:
        return query.new_zeros((*query.shape[:2], value_cache.shape[3]))
    lengths = lengths.clamp(0, capacity)
    own, latest = torch.arange(rows, device=query.device), (lengths - 1).clamp(min=0)
    if key is not None and value is not None:
        # A row without keys writes back what is there.
        has_keys = (lengths > 0)[:, None, None]
        key_cache[own, latest] = torch.where(has_keys, key, key_cache[own, latest])
        value_cache[own, latest] = torch.where(has_keys, value, value_cache[own, latest])
    keys, values = key_cache[:rows], value_cache[:rows]
    if parents is not None:
        place = torch.arange(capacity, device=query.device)
        # Beyond a row's length the table may hold anything.
        is_listed = place < (lengths if key is None else latest)[:, None]
        source = torch.where(is_listed, parents, 0 if key is None else own[:, None]) * capacity + place
        keys, values = (
            cache.flatten(0, 1).index_select(0, source.flatten()).unflatten(0, (rows, capacity))
            for cache in (key_cache, value_cache)
        )
    rules = None, 0.0, False, scale, 0, (-1, -1), None, None, None, lengths, None, False, False, None, 0
    return attention(query[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), *rules)[:, :, 0]
