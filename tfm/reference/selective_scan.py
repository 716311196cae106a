"""Mamba's selective scan, a step at a time (Gu and Dao 2023, "Mamba", section 3.2, equations 2 and 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes (y, final_state) of tfm.ops.selective_scan."""
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs, delta = x.to(wide), delta.to(wide)
    A, B, C = (given.to(wide) for given in (A, B, C))
    delta = F.softplus(delta if delta_bias is None else delta + delta_bias.to(wide))
    if initial_state is None:
        state = torch.zeros((x.shape[0], *A.shape), dtype=wide, device=x.device)
    else:
        state = initial_state.to(wide)
    entering = delta * inputs
    results = []
    for step in range(x.shape[1]):
        decay = torch.exp(delta[:, step, :, None] * A)
        state = decay * state + entering[:, step, :, None] * B[:, step, None]
        results.append((state * C[:, step, None]).sum(-1))
    # Of no steps a result without numbers, which depends on all that those of a step depend on.
    y = torch.stack(results, 1) if results else (entering[..., None] * A * (B * C)[:, :, None]).sum(-1)
    if D is not None:
        y = y + D.to(wide) * inputs
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), state
