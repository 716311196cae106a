"""Dropout as a pure function of (seed, coordinates).

Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives eight 16-bit numbers for each
group of eight neighbouring columns; an element is kept where its number is at least round(65536 p). The counter is

    c0 = column // 8    c1 = row    c2 = sequence * heads + head (0 where there are none)    c3 = site

and the key is the low and the high word of an int64 seed, so that every backend and every tiling draws the same mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.tracing import tracing
from tfm.transforms import transforming

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
# Elements whose mask a CPU draws at once: their counters then stay in its second-level cache.
CHUNK = 1 << 20


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes Philox4x32-7 of four counters and a key.

    Counters are int64 tensors holding uint32 values, of shapes that broadcast: rounds that see only rows or only
    columns then cost next to nothing. `seed` is an int64 scalar tensor. Returns four int64 tensors of uint32 values.
    """
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # High words may carry garbage above bit 31 until the mask that precedes their next multiplication.
        c0 = ((c1 ^ k0) ^ (product1 >> 32)) & WORD
        c2 = ((c3 ^ k1) ^ (product0 >> 32)) & WORD
        c1, c3 = product1, product0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def threshold(p: float) -> int:
    """Returns how many of 65,536 outcomes drop an element."""
    return round(65536 * p)


def keep_scale(p: float) -> float:
    """Returns the factor of a kept element; 0 where nothing is kept."""
    dropped = threshold(p)
    return 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def keep_mask(rows: Tensor, columns: int, groups: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
    """Tells which elements stay.

    Args:
        rows: int64 row coordinates, [..., R].
        columns: the number of columns C.
        groups: int64 c2 coordinates, broadcastable to `rows`.
        p: the probability that an element is dropped.
        seed: int64 scalar tensor.
        site: which of a layer's dropouts this is, c3.

    Returns:
        bool [..., R, C], True where the element is kept.
    """
    device = rows.device
    compiling = torch.compiler.is_compiling()
    # torch.compile makes a graph of its own for one octet: there are two at least.
    octets = torch.arange(columns // 8 + 2 if compiling else (columns + 7) // 8, device=device)
    site_counter = torch.full((), site, dtype=torch.int64, device=device)
    w0, w1, w2, w3 = philox(octets, rows[..., None], groups[..., None], site_counter, seed.to(device))
    if tracing() or transforming():
        # TorchScript cannot view a tensor as another dtype, nor can torch.vmap before torch 2.13.
        words = torch.stack((w0, w1, w2, w3), dim=-1)
        kept = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-3) >= threshold(p)
    else:
        # Two words to an int64; flipping each half's top bit turns the unsigned comparison into a signed one.
        flip = -0x7FFF7FFF7FFF8000
        pairs = torch.stack((((w1 << 32) | w0) ^ flip, ((w3 << 32) | w2) ^ flip), dim=-1)
        halves = pairs.view(torch.int16).flatten(-2)
        # At p = 1 the threshold lies outside int16.
        kept = halves >= threshold(p) - 32768 if threshold(p) < 65536 else torch.zeros_like(halves, dtype=torch.bool)
    # It also makes one for a slice that is all of its tensor.
    return kept.index_select(-1, torch.arange(columns, device=device)) if compiling else kept[..., :columns]


def dropout(x: Tensor, p: float, seed: Tensor | None, site: int = 0) -> Tensor:
    """Drops elements of `x`, and scales the rest by 65536 / (65536 - round(65536 p)).

    Token-wise: the last dimension gives the columns, all others together count the rows.
    """
    if p == 0.0 or x.numel() == 0:
        return x
    assert seed is not None
    return torch.where(token_wise_mask(x, p, seed, site), x * keep_scale(p), 0)


def token_wise_mask(x: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
    """Tells which elements of `x` are kept: bool, in the shape of `x`."""
    columns = x.shape[-1]
    rows = torch.arange(x.numel() // columns, device=x.device)
    group = torch.zeros((), dtype=torch.int64, device=x.device)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return keep_mask(rows, columns, group, p, seed, site).view(x.shape)
    parts = rows.split(max(1, CHUNK // columns))
    masks = [keep_mask(part, columns, group, p, seed, site) for part in parts]
    return (masks[0] if len(masks) == 1 else torch.cat(masks)).view(x.shape)
