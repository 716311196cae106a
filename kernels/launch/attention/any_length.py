"""Settings of attention of any length.

Rows are chosen by the head dims, by what costs registers beside the products, and by the chip; never by lengths or the
number of sequences, so that neither the batch nor padding changes a sentence's bits.

On an H200 a multiprocessor takes 256 cycles for the two products of 64 queries with 64 keys at a head dim of 64, and
256 for the exp2 of their scores: both count alike there, and at 128 the products twice as much. Triton does not overlap
the two within a warp group (it waits for q·k before the softmax), so another program on the multiprocessor must
multiply meanwhile, or another warp group of the same one. Hence, on sm_90 and sm_100:

forward     D 64: 128 x 64, 8 warps held to 128 registers: two programs, 16 warps. A tile of 128 queries reads its keys
            at half the rate of 64, 3 TB/s of the second-level cache at 400 TFLOP/s. D 128: 128 x 128, 8 warps, one
            program (250 registers, 160 KB): two warp groups beside each other; wide tiles rescale acc half as often.
dq          64 x 64, 4 warps: three programs at D 64 (158 registers), two at D 128 (235).
dk and dv   Four accumulators of a tile are alive at once (s, dp, dk, dv), which sets the tile. D 64: 64 x 64, 4 warps,
            250 registers, two programs. D 128: 32 x 128, 8 warps, 250 registers, one program. At 256 dk and dv are
            made in two passes, each of which computes s again.

D 512       Neither q nor acc of wider heads fits. A program makes 256 columns of its results, 128 in fp32, and forms
            the scores for itself, from 64 columns of q and k at a time: at 512 the forward computes half as much again.

A bias or a mask as bits takes 60 to 90 registers, as does dropout in the backward: smaller tiles, so that two or three
programs still share the multiprocessor; still smaller ones for both at once, so that neither triton 3.6, whose code
takes more registers than 3.7's, nor the newer of triton's two assemblers, which takes up to 30 more than the older,
spills on sm_90 (what does is in tools/check_kernels/allowed.py). In the forward, whose threads test words of bits,
dropout takes few registers; dk and dv of D 128 have 128 keys with it, so that no two warps share rows of a product,
between whose layouts the tile would move. Every row of sm_80, sm_86, sm_89 and sm_120 fits 99 KB; there products hold
their first factor in registers, too. fp32 is multiplied without tensor cores, or by tf32 of the same small tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tfm.kernels.launch.rows import RowTiles
from tfm.kernels.launch.settings import Settings


@dataclass(frozen=True)
class AttentionTiles(Settings):
    """The tiles that cover the queries and keys of one head: block_queries x block_keys.

    `max_registers` of a thread, None where the compiler may take what it likes; with 2 `passes` dk and dv have a launch
    each.
    """

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    passes: int = 1

    @property
    def tile(self) -> tuple[int, int, int]:
        """The blocks, and how many octets of keys a thread decides for dropout: a word's at most, no octet twice."""
        octets = self.block_queries * self.block_keys // (256 * self.num_warps)
        return self.block_queries, self.block_keys, max(1, min(4, octets, self.block_keys // 8))


# The widest head dim whose rows a program holds.
WHOLE = 256
# By class of head dims: rows for a plain call, for dropout, for a bias or a mask as bits, for both. The last row given
# serves the rest.
Table = dict[int, tuple[AttentionTiles, ...]]

FORWARD: Table = {
    64: (
        AttentionTiles(128, 64, 8, 2, 128), AttentionTiles(64, 64, 4, 2), AttentionTiles(64, 64, 4, 2),
        AttentionTiles(64, 32, 4, 2, 168),
    ),
    128: (AttentionTiles(128, 128, 8, 2), AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 32, 4, 2)),
    192: (AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 32, 4, 2)),
    256: (AttentionTiles(128, 32, 8, 2), AttentionTiles(64, 32, 8, 2)),
    512: (AttentionTiles(64, 32, 8, 2),),
}  # fmt: skip
QUERIES: Table = {
    64: (
        AttentionTiles(64, 64, 4, 2), AttentionTiles(64, 32, 4, 2, 168), AttentionTiles(64, 32, 4, 2, 168),
        AttentionTiles(64, 32, 4, 2),
    ),
    128: (
        AttentionTiles(64, 64, 4, 2), AttentionTiles(64, 32, 4, 2), AttentionTiles(64, 32, 4, 2),
        AttentionTiles(64, 16, 4, 2),
    ),
    192: (
        AttentionTiles(64, 32, 4, 2), AttentionTiles(64, 32, 8, 2), AttentionTiles(64, 32, 8, 2),
        AttentionTiles(64, 16, 8, 2),
    ),
    256: (AttentionTiles(64, 32, 8, 2), AttentionTiles(64, 16, 8, 2)),
    512: (AttentionTiles(64, 32, 8, 2),),
}  # fmt: skip
KEYS: Table = {
    64: (
        AttentionTiles(64, 64, 4, 2), AttentionTiles(32, 64, 4, 3), AttentionTiles(32, 64, 4, 3),
        AttentionTiles(16, 64, 4, 3),
    ),
    128: (
        AttentionTiles(32, 128, 8, 2), AttentionTiles(16, 128, 8, 2), AttentionTiles(32, 64, 8, 2),
        AttentionTiles(16, 64, 8, 3),
    ),
    192: (
        AttentionTiles(32, 64, 8, 2), AttentionTiles(16, 64, 8, 2), AttentionTiles(16, 64, 8, 2),
        AttentionTiles(16, 64, 8, 2, passes=2),
    ),
    256: (AttentionTiles(32, 64, 8, 2, passes=2), AttentionTiles(16, 64, 8, 2, 255, passes=2)),
    512: (AttentionTiles(32, 64, 8, 2, passes=2),),
}  # fmt: skip
# Of chips without tensor cores that read both factors from shared memory: sm_80, sm_86, sm_89, sm_120.
NARROW_FORWARD: Table = {
    64: (AttentionTiles(64, 64, 4, 2, 168), AttentionTiles(64, 32, 4, 2)),
    128: (AttentionTiles(128, 64, 8, 2), AttentionTiles(64, 32, 4, 2)),
    192: (AttentionTiles(64, 32, 8, 2),),
    256: (AttentionTiles(64, 32, 8, 2), AttentionTiles(32, 32, 8, 2)),
    512: (AttentionTiles(64, 32, 8, 2),),
}
NARROW_QUERIES: Table = {
    64: (AttentionTiles(64, 64, 4, 2), AttentionTiles(64, 32, 4, 2)),
    128: (AttentionTiles(64, 32, 4, 2), AttentionTiles(64, 32, 8, 2)),
    192: (AttentionTiles(32, 32, 8, 2),),
    256: (AttentionTiles(32, 32, 8, 1),),
    512: (AttentionTiles(32, 32, 8, 2),),
}
NARROW_KEYS: Table = {
    64: (AttentionTiles(32, 64, 8, 2), AttentionTiles(16, 64, 4, 2)),
    128: (AttentionTiles(32, 64, 8, 2), AttentionTiles(32, 32, 8, 2)),
    192: (AttentionTiles(16, 32, 8, 2),),
    256: (AttentionTiles(16, 32, 8, 2, passes=2),),
    512: (AttentionTiles(16, 32, 8, 2, passes=2),),
}
FP32_FORWARD: Table = {
    64: (AttentionTiles(32, 32, 4, 2),),
    128: (AttentionTiles(32, 32, 8, 2, 128),),
    192: (AttentionTiles(32, 32, 8, 2),),
    256: (AttentionTiles(16, 32, 8, 2),),
    512: (AttentionTiles(16, 32, 8, 2),),
}
FP32_QUERIES: Table = {
    64: (AttentionTiles(32, 32, 4, 2, 168), AttentionTiles(16, 32, 4, 2, 255)),
    128: (AttentionTiles(16, 32, 8, 2),),
    192: (AttentionTiles(16, 16, 8, 2),),
    256: (AttentionTiles(16, 16, 8, 2),),
    512: (AttentionTiles(16, 16, 8, 2),),
}
FP32_KEYS: Table = {
    64: (AttentionTiles(16, 32, 8, 1),),
    128: (AttentionTiles(16, 32, 8, 2), AttentionTiles(16, 32, 8, 1)),
    192: (AttentionTiles(16, 16, 8, 2),),
    256: (
        AttentionTiles(16, 16, 8, 2), AttentionTiles(16, 16, 8, 2), AttentionTiles(16, 16, 8, 2),
        AttentionTiles(16, 16, 8, 1, 255),
    ),
    512: (AttentionTiles(16, 16, 8, 2, 255, passes=2),),
}  # fmt: skip


def attention_forward(dim: int, value_dim: int, dtype: torch.dtype, extras: int, major: int) -> AttentionTiles:
    """Returns the forward's row; `extras`: 1 for dropout and 2 for a bias or a mask as bits, `major` is the chip's."""
    return _row((FORWARD, NARROW_FORWARD, FP32_FORWARD), dim, value_dim, dtype, extras, major)


def attention_backward_queries(dim: int, value_dim: int, dtype: torch.dtype, extras: int, major: int) -> AttentionTiles:
    """Returns the row of dq, by the arguments of attention_forward."""
    return _row((QUERIES, NARROW_QUERIES, FP32_QUERIES), dim, value_dim, dtype, extras, major)


def attention_backward_keys(dim: int, value_dim: int, dtype: torch.dtype, extras: int, major: int) -> AttentionTiles:
    """Returns the row of dk and dv, by the arguments of attention_forward."""
    return _row((KEYS, NARROW_KEYS, FP32_KEYS), dim, value_dim, dtype, extras, major)


def _row(
    tables: tuple[Table, Table, Table], dim: int, value_dim: int, dtype: torch.dtype, extras: int, major: int
) -> AttentionTiles:
    wide, narrow, single = tables
    table = single if dtype == torch.float32 else wide if major in (9, 10) else narrow
    rows = table[dims_class(dim, value_dim)]
    return rows[min(extras, len(rows) - 1)]


def dims_class(dim: int, value_dim: int) -> int:
    """Returns the narrowest class of rows for these head dims; 192 is for keys wider than values, 192 and 128."""
    if max(dim, value_dim) > WHOLE:
        return 512
    if max(dim, value_dim) <= 128:
        return 64 if max(dim, value_dim) <= 64 else 128
    return 192 if dim <= 192 and value_dim <= 128 else 256


def split_dim(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Splits a head dim into two powers of two, at least 16 each, that cover it; the second is 0 where one does.

    Tiles are powers of two; 96 as 64 + 32 multiplies and stores what 128 would waste. fp32, which a thread multiplies
    alone, holds whole rows of both factors in registers: they are halved from 128 on. Of more than WHOLE columns the
    first is that of slices, which alone do not cover it.
    """
    if dim > WHOLE:
        return (128, 0) if dtype == torch.float32 else (256, 0)
    whole = max(16, 1 << (dim - 1).bit_length())
    first = whole // 2
    rest = max(16, 1 << (dim - first - 1).bit_length()) if dim > first else 0
    split = first >= 16 and rest > 0 and (first + rest < whole or (dtype == torch.float32 and whole >= 128))
    return (first, rest) if split else (whole, 0)


def slices(dim: int, dtype: torch.dtype) -> int:
    """Returns the slices of a head dim, 1 where it is whole."""
    return -(-dim // split_dim(dim, dtype)[0]) if dim > WHOLE else 1


def mask_bits(queries: int) -> RowTiles:
    """Returns tiles of 128 keys, a line of a bool mask and four words; a program goes down all queries."""
    rows = 128 if queries > 32 else 32
    return RowTiles(programs=1, block_rows=rows, block_columns=128, chunks=1, num_warps=rows // 16)
