"""Settings of attention of one query a row over a cache.

Nothing here depends on the number of rows or on the capacity, so that neither the batch nor a larger cache changes a
row's bits: a row's keys are cut into pieces of `split_keys`, and a cache that holds no more has one piece and one
launch.

A query a head multiplies two numbers for each that it reads, so that only bytes in flight count: some 25 KB on each
multiprocessor of an H200 at 4.3 TB/s and 0.7 µs. A translation's 20 to 100 keys of 64 columns in bf16 are one to four
tiles of 32 keys, whose keys and values, 4 KB each, one warp asks for at once, 16 loads of 16 bytes a thread; 2,048
hypotheses with 8 heads are 16,384 such programs, some 20 on a multiprocessor. Longer caches are cut every 256 keys:
64 KB at 64 columns, so that a piece's sums, 256 bytes and two numbers written and read once more, are less than a
hundredth; 16 rows of 32 heads and 4,000 keys are 8,192 pieces. Query heads that share a key head are the rows of a
tensor core's tile, 16 of them at least, and share the reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tfm.kernels.launch.settings import Settings


@dataclass(frozen=True)
class DecodeTiles(Settings):
    """The tiles of a program: `split_keys` keys for `block_heads` query heads of a key head, `block_keys` at a time.

    It has `stages` - 1 tiles on their way from memory while it works on another. `max_registers` of a thread; None
    where the compiler may choose.
    """

    block_heads: int
    block_keys: int
    split_keys: int
    num_warps: int
    stages: int
    max_registers: int | None = None

    def splits(self, capacity: int) -> int:
        """Returns how many programs share the keys of a row."""
        return max(1, -(-capacity // self.split_keys))


def tiles(dim: int, group: int, dtype: torch.dtype) -> DecodeTiles:
    """Returns the tiles for heads of `dim`, the wider of D and Dv, and `group` query heads a key head."""
    wide = next(width for width in (64, 128, 256, 512) if dim <= width)
    exact = dtype == torch.float32
    if group == 1:
        # A thread holds 64 keys' and 64 values' numbers of 16 bits, or half as many of fp32.
        block_keys = 16 if wide == 512 or (exact and wide == 256) else 32
        num_warps = block_keys * wide // (1024 if exact else 2048)
        # Left to itself, the assembler spills a word or two for some dims and chips, to fit one program more.
        most = None if wide == 64 and not exact else 168
        return DecodeTiles(1, block_keys, 256, num_warps, stages=1, max_registers=most)
    if exact:
        # A product without tensor cores holds both factors in registers.
        return DecodeTiles(16, 16, 256, 8 if wide == 512 else 4, stages=2, max_registers=168 if wide == 64 else None)
    return DecodeTiles(16, 32, 256, 8 if wide > 128 else 4, stages=2, max_registers=None if wide == 512 else 168)
