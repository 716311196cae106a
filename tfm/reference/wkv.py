"""RWKV's attention by exponential decay, a step at a time (Peng et al. 2023, "RWKV", equation 16 and appendix D)."""

from __future__ import annotations

import torch
from torch import Tensor

# The exponent of a state that holds nothing, finite so that differences to it are.
NOTHING = -1e38


def wkv(
    decay: Tensor, first: Tensor, key: Tensor, value: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Computes (y, final_state) of tfm.ops.wkv."""
    batch, steps, channels = key.shape
    wide = torch.promote_types(key.dtype, torch.float32)
    rate, first = -decay.to(wide).exp(), first.to(wide)
    if initial_state is None:
        numerator, denominator = torch.zeros(2, batch, channels, dtype=wide, device=key.device)
        maximum = torch.full_like(numerator, NOTHING)
    else:
        numerator, denominator, maximum = initial_state.to(wide)
    results = []
    for k, v in zip(key.to(wide).unbind(1), value.to(wide).unbind(1), strict=True):
        largest = torch.maximum(maximum, first + k)
        before, now = (maximum - largest).exp(), (first + k - largest).exp()
        results.append((before * numerator + now * v) / (before * denominator + now))
        decayed = maximum + rate
        maximum = torch.maximum(decayed, k)
        before, now = (decayed - maximum).exp(), (k - maximum).exp()
        numerator, denominator = before * numerator + now * v, before * denominator + now
    y = torch.stack(results, 1) if steps else key * value
    return y.to(key.dtype), torch.stack((numerator, denominator, maximum))
