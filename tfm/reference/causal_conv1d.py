"""A causal convolution over each channel's own sequence (Gu and Dao 2023, "Mamba", section 3.4, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Computes (y, final_state) of tfm.ops.causal_conv1d."""
    width, wide = weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    # Before the first step lies the state, or zeros.
    if initial_state is None:
        whole = F.pad(x, (width - 1, 0))
    else:
        whole = torch.cat((initial_state.to(x.dtype), x), dim=2)
    steps = x.shape[2]
    taps, padded = weight.to(wide), whole.to(wide)
    y = torch.zeros((), dtype=wide, device=x.device) if bias is None else bias.to(wide)[:, None]
    for k in range(width):
        y = y + taps[:, k, None] * padded[:, :, k : k + steps]
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), whole[:, :, steps:]
