"""Pieces of a row's softmax, of programs that share its keys, and what they add up to.

("Flash-Decoding", Dao et al. 2023.) A piece is what FlashAttention's running sums are after some of the keys: Σ exp v,
[Dv], and beside it top and Σ exp; of a piece without keys the top is -inf and the sums are 0. They are added up in
their order, so that the bits are the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tfm.kernels.softmax import shrinkage

# The pieces of a row that are added up at once.
TOGETHER = 16


@triton.jit
def store_piece(pieces, piece, top, total, inside):
    """Stores (top, total) of pieces; their Σ exp v lie apart."""
    tl.store(pieces + 2 * piece, top, mask=inside)
    tl.store(pieces + 2 * piece + 1, total, mask=inside)


@triton.jit
def add_pieces(
    sums, pieces, first, used, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    IS_FORMED: tl.constexpr,
):  # fmt: skip
    """Computes (top, total, sums [BLOCK_VALUE_DIM]) of a row whose `used` pieces begin at `first`, int64."""
    column = tl.arange(0, BLOCK_VALUE_DIM)
    top = tl.cast(float("-inf"), tl.float32)
    total = tl.cast(0.0, tl.float32)
    acc = tl.zeros([BLOCK_VALUE_DIM], tl.float32)
    for start in range(0, used, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        inside = split < used
        piece = first + split
        tops = tl.load(pieces + 2 * piece, mask=inside, other=float("-inf"))
        totals = tl.load(pieces + 2 * piece + 1, mask=inside, other=0.0)
        address = sums + piece[:, None] * VALUE_DIM + column[None, :]
        parts = tl.load(address, mask=inside[:, None] & (column < VALUE_DIM)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(tops, axis=0))
        # Without any key all tops are -inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = shrinkage(tops, base, IS_FORMED)
        shrink = shrinkage(top, base, IS_FORMED)
        top, total = higher, total * shrink + tl.sum(totals * shares, axis=0)
        acc = acc * shrink + tl.sum(parts * shares[:, None], axis=0)
    return top, total, acc
