"""Biases of attention by distance, [H, 2 R + 1], as published models make them of their parameters.

`attention` adds them as it goes, so that no bias [H, Sq, Sk] is ever stored: R is the distance from which on all keys
are alike (T5), or that of the farthest key (ALiBi).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm.errors import BadArgument
from tfm.ops.checks import check_floating


def t5_bias(weight: Tensor, max_distance: int = 128, is_bidirectional: bool = True) -> Tensor:
    """Returns the position bias of T5 (Raffel et al. 2020, section 2.1): each distance has its bucket's number.

    Half of the buckets of each direction hold one distance each, the others ever more, up to `max_distance`.

    Args:
        weight: [buckets, H], what `nn.Embedding` of T5's relative_attention_bias holds; gets its gradient, the same
            bits on every run.
        max_distance: from here on all keys share the last bucket.
        is_bidirectional: half of the buckets are for keys behind the query; else all of these share the first.

    Returns:
        [H, 2 · max_distance + 1] in the dtype of `weight`, for `relative_bias` of `attention`.

    Raises:
        ValueError: too few buckets, or a distance that does not exceed those with a bucket of their own.
    """
    check_floating(weight=weight)
    if weight.dim() != 2:
        raise BadArgument(f"weight: expected [buckets, heads], got shape {tuple(weight.shape)}")
    buckets = weight.shape[0] // 2 if is_bidirectional else weight.shape[0]
    exact = buckets // 2
    if exact == 0 or max_distance <= exact:
        raise BadArgument(
            f"weight: expected at least {4 if is_bidirectional else 2} buckets, and max_distance above {exact},"
            f" got {weight.shape[0]} and {max_distance}"
        )
    distance = torch.arange(-max_distance, max_distance + 1, device=weight.device)
    far = distance.abs() if is_bidirectional else (-distance).clamp(min=0)
    # In fp32, as models were trained: at some distances the last bit decides the bucket.
    share = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    bucket = torch.where(far < exact, far, shared)
    if is_bidirectional:
        bucket = bucket + (distance > 0) * buckets
    # Unlike an index, whose gradient is a sum in any order.
    return F.embedding(bucket, weight).t()


def alibi_bias(slopes: Tensor, max_distance: int) -> Tensor:
    """Returns the linear biases of ALiBi (Press et al. 2022, section 3): -slope · |distance|.

    Args:
        slopes: [H], floating point, as `alibi_slopes` has them or learnt.
        max_distance: at least that of any key from any query: one less than the longest sequence.

    Returns:
        [H, 2 · max_distance + 1] in the dtype of `slopes`, for `relative_bias` of `attention`.
    """
    check_floating(slopes=slopes)
    if slopes.dim() != 1 or max_distance < 0:
        raise BadArgument(
            f"slopes: expected [heads], and max_distance >= 0, got shape {tuple(slopes.shape)} and {max_distance}"
        )
    distance = torch.arange(-max_distance, max_distance + 1, device=slopes.device).abs()
    return -slopes[:, None] * distance.to(slopes.dtype)


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """Returns the slopes of ALiBi: fp32 [heads], 2^(-8/n), 2^(-16/n), ..., n the power of two up to `heads`.

    More heads than n take every other slope of 2 n heads, as the paper's code has it.
    """
    if heads < 1:
        raise BadArgument(f"heads: expected at least 1, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    exponents = [-8 * (place + 1) / power for place in range(power)]
    exponents += [-4 * (2 * place + 1) / power for place in range(heads - power)]
    return torch.tensor([2.0**exponent for exponent in exponents], device=device)
