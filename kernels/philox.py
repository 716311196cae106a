"""Dropout masks inside kernels: Philox4x32-7 of coordinates, bit for bit those of tfm.reference.dropout."""

from __future__ import annotations

import triton
import triton.language as tl


def threshold_and_scale(p: float) -> tuple[int, float]:
    """Returns how many of 65,536 outcomes drop an element, and the factor of a kept one."""
    threshold = round(65536 * p)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Computes Philox4x32-7 of four counters and a key, all uint32, of shapes that broadcast.

    (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.)
    """
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0, c1, c2, c3 = c1 ^ k0 ^ high1, low1, c3 ^ k1 ^ high0, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def keep_mask(row, first_column, group, site, seed, threshold, BLOCK_COLUMNS: tl.constexpr):
    """Tells which elements of a tile dropout keeps: int1 [R, BLOCK_COLUMNS], one Philox call for eight of them.

    `row` is [R, 1]; `first_column` is a multiple of 8; `seed` points to an int64.
    """
    key = tl.load(seed)
    octet = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)[None, :]
    w0, w1, w2, w3 = philox(
        octet.to(tl.uint32), row.to(tl.uint32), tl.cast(group, tl.uint32), tl.cast(site, tl.uint32),
        key.to(tl.uint32), (key >> 32).to(tl.uint32),
    )  # fmt: skip
    # Joins add minor dimensions, so the last one tells the two halves of a word apart: low half first.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves >= threshold, [row.shape[0], BLOCK_COLUMNS])


@triton.jit
def keep_tile(row, first_column, group, site, seed, threshold, BLOCK_COLUMNS: tl.constexpr, OCTETS: tl.constexpr):
    """Tells what keep_mask does, for a tile that meets a product of matrices: int1 [R, BLOCK_COLUMNS].

    Threads hold other elements of a product than they draw. What moves between them is a word of bits for OCTETS · 8
    columns, tested where it arrives: little shared memory, and no barrier where a row's threads are all of one warp. A
    mask of int1 would be moved element by element, between barriers.
    """
    key = tl.load(seed)
    octet = first_column // 8 + OCTETS * tl.arange(0, BLOCK_COLUMNS // (8 * OCTETS))[None, :]
    limits = tl.mul(tl.cast(threshold, tl.uint32), 0x10001, sanitize_overflow=False)
    # A threshold of 65,536, which no half has, drops all.
    highest = tl.where(threshold > 0xFFFF, 0, 0x80008000).to(tl.uint32)
    kept = tl.zeros([row.shape[0], BLOCK_COLUMNS // (8 * OCTETS)], tl.uint32)
    for i in tl.static_range(OCTETS):
        words = philox(
            (octet + i).to(tl.uint32), row.to(tl.uint32), tl.cast(group, tl.uint32), tl.cast(site, tl.uint32),
            key.to(tl.uint32), (key >> 32).to(tl.uint32),
        )  # fmt: skip
        for j in tl.static_range(4):
            kept = (kept >> 1) | (reached_limits(words[j], limits) & highest)
    # A sum of one: the compiler, which would rather draw each word in all threads that test it, does not look behind.
    kept = tl.xor_sum(kept[:, None, :], axis=1)
    # Lower halves hold the even columns, upper ones the odd, the last in the highest bit. Shifts by the lanes' columns
    # first leave bits at the same places in all lanes.
    place, later = tl.arange(0, 8), tl.arange(0, OCTETS)
    bits = kept[:, :, None] >> (16 - 4 * OCTETS + place // 2 + 16 * (place % 2))[None, None, :].to(tl.uint32)
    bits = bits[:, :, None, :] >> (4 * later)[None, None, :, None].to(tl.uint32)
    return tl.reshape((bits & 1) != 0, [row.shape[0], BLOCK_COLUMNS])


@triton.jit
def reached_limits(words, limits):
    """Compares the halves of words with those of `limits`, uint32: the highest bit of each tells if it is as large."""
    # No half borrows from its neighbour where one has its highest bit set, the other cleared.
    differences = tl.sub(words | 0x80008000, limits & 0x7FFF7FFF, sanitize_overflow=False)
    return (words & (limits ^ 0xFFFFFFFF)) | ((words ^ limits ^ 0xFFFFFFFF) & differences)
