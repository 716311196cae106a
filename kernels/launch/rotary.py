"""Settings of the rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass

from tfm.kernels.launch.rows import width
from tfm.kernels.launch.settings import Settings


@dataclass(frozen=True)
class RotaryTiles(Settings):
    """The tiles of the rotary embedding: `programs` of `block_tokens` tokens, for each `group` of heads.

    A head is two halves of at most `block_half` columns, and at most `block_rest` that are not turned.
    """

    programs: int
    block_tokens: int
    group: int
    block_half: int
    block_rest: int
    num_warps: int


def tiles(tokens: int, half: int, columns: int) -> RotaryTiles:
    """Returns 16 columns of a head for each thread of 4 warps, and 8 heads in turn, which share the angles."""
    block_half = width(half)
    block_rest = width(columns - 2 * half) if columns > 2 * half else 0
    block_tokens = max(1, 2048 // max(2 * block_half, block_rest))
    return RotaryTiles(-(-tokens // block_tokens), block_tokens, 8, block_half, block_rest, num_warps=4)
