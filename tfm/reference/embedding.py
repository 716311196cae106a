"""Token embedding with scale, positions and dropout ("Attention Is All You Need", sections 3.4, 3.5 and 5.4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.reference.dropout import dropout


def embedding(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor,
    position_weight: Tensor | None,
    scale: float,
    dropout_p: float,
    padding_idx: int | None,
    sparse: bool,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """Computes tfm.ops.embedding."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = F.embedding(tokens, weight, padding_idx, sparse=sparse).to(wide) * scale
    if position_weight is None:
        rows = rows + sinusoid(positions, weight.shape[1], wide)
    else:
        rows = rows + F.embedding(positions, position_weight).to(wide)
    return dropout(rows, dropout_p, seed, site).to(weight.dtype)


def sinusoid(positions: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the paper's positional encoding (3.5): sin(position / 10000^(2i/dim)) at column 2i, cos at 2i + 1.

    Args:
        positions: integers, any shape.
        dim: the number of columns; the last cosine is left out where it is odd.

    Returns:
        [*positions.shape, dim] of `dtype`.
    """
    pair = torch.arange((dim + 1) // 2, device=positions.device, dtype=dtype)
    angles = positions[..., None].to(dtype) * torch.exp(pair * (-2 * math.log(10000.0) / (dim or 1)))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim]
