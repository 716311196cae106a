"""Rotary position embedding (Su et al., "RoFormer", 2021, section 3.2 and equation 34)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """Computes tfm.ops.rotary of one tensor."""
    if positions is not None:
        # Unlike an index, this refuses negative positions.
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[:1] if x.dim() == 3 else (x.shape[0], x.shape[2])
    cos, sin = (table.to(wide).expand(*tokens, table.shape[-1]).unsqueeze(1) for table in (cos, sin))
    rotated, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    pairs = rotated.to(wide)
    first, second = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((joined.to(x.dtype), rest), dim=-1)


def rotary_table(
    length: int, dim: int, theta: float, device: torch.device | str | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes tfm.ops.rotary_table."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angles = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
