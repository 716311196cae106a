"""Settings of attention over at most a few hundred keys: all keys and values of a head on chip at once.

Rows are chosen by the tile that covers max_k and by the head dim, never by the number of sequences, so that a
sentence's bits do not change with its batch, nor with padding while the row is the same.

A translation batch is 256 to 512 sentences of 6 to 34 tokens with 8 heads of 64: 2,048 to 4,096 (sentence, head) pairs
of some 2 KB a matrix. There arithmetic is nothing and latency everything, so the rows up to 64 keys are the smallest
that fill a tensor core: 16 queries a tile, one warp in the forward, which goes on through its queries only as far as
its sentence has any. With every rule it takes 109, 158 and 197 registers at 16, 32 and 64 keys: 18, 12 and 10 pairs on
a multiprocessor of an H200, so 2,048 pairs in one wave to one and a half. Tiles of 64 rows, which HGMMA takes, would
be three quarters padding there. Several heads a program would save nothing: each pair's bytes are its own, and a lane
of one warp has a dozen 16-byte loads in flight as it is. The backward keeps dk and dv in registers, 2 · keys · dim
numbers of 4 bytes, and takes 2 to 4 warps so that they are 32 to 64 of a thread's registers: causal, with dropout, 130,
128 and 159 in all, 7, 4 and 3 pairs on a multiprocessor.

From 65 keys on the forward's tiles have 64 queries (HGMMA; 195 registers, two programs of 4 warps). A bias, whose every
element takes an address, has 16 at a time. The backward's tiles have the keys as rows, 64 to 256 of them (HGMMA), and
16 queries as columns: 8 warps, one program on a multiprocessor, 192 to 255 registers. Chips without wide tensor
cores hold the products' first factors in registers, too, and take fewer queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tfm.kernels.launch.settings import Settings


@dataclass(frozen=True)
class ShortForwardTiles(Settings):
    """Tiles of block_queries x block_keys; a program takes all queries of a head (`takes_all`), or one tile of them.

    `max_registers` of a thread; None where the compiler may choose.
    """

    block_queries: int
    block_keys: int
    num_warps: int
    takes_all: bool
    max_registers: int | None = None

    def splits(self, max_q: int) -> int:
        """The programs that share the queries of one head."""
        return 1 if self.takes_all else -(-max_q // self.block_queries)


@dataclass(frozen=True)
class ShortBackwardTiles(Settings):
    """Tiles of block_queries x block_keys; with 2 `passes` dv has a launch of its own, and its registers."""

    block_queries: int
    block_keys: int
    num_warps: int
    passes: int
    max_registers: int | None = None


# A program of the backward goes through all queries of its keys, one tile after another.
MOST_QUERIES = 256

# (head dim, 64 where less; keys): queries of a tile, warps. Of 64 queries where tensor cores take so many.
SHORT_FORWARD = {
    (64, 16): (16, 1), (64, 32): (16, 1), (64, 64): (16, 1), (64, 128): (64, 4), (64, 256): (64, 8),
    (128, 16): (16, 4), (128, 32): (16, 2), (128, 64): (16, 4), (128, 128): (64, 8),
    (256, 16): (16, 4), (256, 32): (16, 4), (256, 64): (16, 4),
}  # fmt: skip
SHORT_FORWARD_FP32 = {
    (64, 32): (16, 2), (64, 64): (16, 8), (64, 128): (16, 8),
    (128, 32): (16, 16), (128, 64): (16, 8),
    (256, 32): (16, 8),
}  # fmt: skip
# The same, and the passes.
SHORT_BACKWARD = {
    (64, 16): (16, 2, 1), (64, 32): (16, 4, 1), (64, 64): (16, 4, 1), (64, 128): (16, 8, 1), (64, 256): (16, 8, 2),
    (128, 16): (16, 4, 1), (128, 32): (16, 4, 1), (128, 64): (16, 4, 2), (128, 128): (16, 8, 2),
    (256, 16): (16, 8, 1), (256, 32): (16, 8, 1),
}  # fmt: skip
SHORT_BACKWARD_FP32 = {
    (64, 32): (16, 8, 1), (64, 64): (16, 16, 1),
    (128, 32): (16, 16, 1),
}  # fmt: skip
# Left to itself, the newer assembler spills a few words of these rows, the first on sm_90 too, to fit one program more.
CAPPED_FORWARD, CAPPED_BACKWARD = (64, 16), (64, 64)
# An address for each element of the bias does not fit beside these rows' sums.
NO_BIAS = ((64, 256), (128, 128), (256, 32))
# Of sm_100: nor do a mask's bits beside this one's, and beside the other's in fp32 a bias takes 8 warps' registers.
NO_MASK, FEWER_WARPS = (64, 256), (64, 64)


def short_block(size: int) -> int:
    """Returns the smallest tile that covers `size`: a power of two, at least the 16 that a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def short_attention_forward(
    max_q: int, max_k: int, dim: int, dtype: torch.dtype, has_bias: bool, has_words: bool, major: int
) -> ShortForwardTiles | None:
    """Returns the tiles of a head, or None where it does not fit.

    `dim`: the wider of D and Dv; `has_words`: a mask as bits; `major`: of the compute capability.
    """
    place = _place(max_k, dim, 32 if has_words or dtype == torch.float32 else 16)
    row = (SHORT_FORWARD_FP32 if dtype == torch.float32 else SHORT_FORWARD).get(place)
    if row is None or max_q > MOST_QUERIES:
        return None
    queries, num_warps = row
    if queries == 64 and (has_bias or (has_words and place == (64, 256)) or not _has_wide_tensor_cores(major)):
        queries = 16 if has_bias or has_words else 32
    most = 255 if major in (9, 10) and dtype != torch.float32 and place == CAPPED_FORWARD else None
    return ShortForwardTiles(queries, place[1], num_warps, takes_all=place[1] <= 64, max_registers=most)


def short_attention_backward(
    max_q: int, max_k: int, dim: int, dtype: torch.dtype, has_bias: bool, has_words: bool, major: int
) -> ShortBackwardTiles | None:
    """Returns the tiles of the backward, by the arguments of short_attention_forward."""
    place = _place(max_k, dim, 32 if has_words or dtype == torch.float32 else 16)
    row = (SHORT_BACKWARD_FP32 if dtype == torch.float32 else SHORT_BACKWARD).get(place)
    if row is None or max_q > MOST_QUERIES or (has_bias and place in NO_BIAS):
        return None
    if major == 10 and has_words and place == NO_MASK:
        return None
    queries, num_warps, passes = row
    if major == 10 and has_bias and dtype == torch.float32 and place == FEWER_WARPS:
        num_warps = 8
    most = 255 if major == 10 and dtype != torch.float32 and place == CAPPED_BACKWARD else None
    return ShortBackwardTiles(queries, place[1], num_warps, passes, max_registers=most)


def _place(max_k: int, dim: int, least: int) -> tuple[int, int]:
    """Returns the row of a table. A mask's bits come in words of 32, and so do the keys of fp32, for fewer rows."""
    return max(64, short_block(dim)), max(short_block(max_k), least)


def _has_wide_tensor_cores(major: int) -> bool:
    """Tells whether products read their first factor from shared memory, 64 rows at once, and leave registers free."""
    return major in (9, 10)
