"""The real-gated linear recurrent unit, a step at a time (De et al. 2024, "Griffin", section 2.4, equations 1 to 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The paper's c.
C = 8.0
# Bounds the derivative of the square root, as RecurrentGemma does: the gates of a channel that keeps all are near it.
STEEPEST = 1000.0


def rg_lru(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, recurrent_param: Tensor, reset: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes (y, final_state) of tfm.ops.rg_lru."""
    wide = torch.promote_types(x.dtype, torch.float32)
    log_a = -C * F.softplus(recurrent_param.to(wide)) * recurrence_gate.to(wide).sigmoid()
    a, scale = log_a.exp(), _bounded_sqrt(-torch.expm1(2.0 * log_a))
    if reset is not None:
        scale = scale.masked_fill(reset[..., None], 1.0)
    inputs = x.to(wide) * input_gate.to(wide).sigmoid() * scale
    if initial_state is None:
        state = torch.zeros((x.shape[0], x.shape[2]), dtype=wide, device=x.device)
    else:
        state = initial_state.to(wide)
    results = []
    for step in range(x.shape[1]):
        if reset is not None:
            state = state.masked_fill(reset[:, step, None], 0.0)
        state = a[:, step] * state + inputs[:, step]
        results.append(state)
    y = torch.stack(results, 1) if results else inputs
    return y.to(x.dtype), state


def _bounded_sqrt(x: Tensor) -> Tensor:
    """Computes the square root, with a derivative of at most STEEPEST."""
    least = 0.25 / STEEPEST**2
    near = x.sqrt().detach() + STEEPEST * (x - x.detach())
    return torch.where(x < least, near, x.clamp(min=least).sqrt())
