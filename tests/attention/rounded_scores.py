"""Attention of huge scores as fp32 has it: the softmax in float64 of scores that were formed in fp32.

fp32 saturates: finfo.min + 3 is finfo.min, and beside -1e9 multiples of 64 are left, so that a row of -1e9 attends to
all its keys alike. Plain torch does that, float64 does not. Queries and keys are small multiples of 1/2 and scales
powers of 2, so that products are exact in any order, and a bias is added with one rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.reference.dropout import keep_mask, keep_scale

LOWEST = torch.finfo(torch.float32).min


def halves(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape) / 2


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, is_causal: bool = False,
    scale: float = 0.25, softcap: float | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0,
    seed: int = 0, dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """ops.attention in `dtype`, but for its scores."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = scale * (query.float() @ key.float().mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    is_empty = (scores == float("-inf")).all(-1, keepdim=True)
    scores = scores.to(dtype)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.masked_fill(is_empty, 0.0).softmax(-1)[..., : key.shape[2]].masked_fill(is_empty, 0.0)
    if dropout_p:
        batch, heads, rows, columns = weights.shape
        groups = torch.arange(batch * heads).view(batch, heads, 1)
        places = torch.arange(rows).expand(batch, heads, -1)
        keep = keep_mask(places, columns, groups, dropout_p, torch.tensor(seed), 0)
        weights = torch.where(keep, weights * keep_scale(dropout_p), 0.0)
    return weights @ value.to(dtype)
