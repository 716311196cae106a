"""The kernels' dropout masks are the reference's, bit for bit."""

from __future__ import annotations

import oracle
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm.kernels.philox import keep_mask, keep_tile, philox, reached_limits, threshold_and_scale
from tfm.reference import dropout as reference


@triton.jit
def words_kernel(counters, seed, words):
    place = tl.arange(0, 1)
    key = tl.load(seed)
    c0, c1, c2, c3 = (
        tl.load(counters + place).to(tl.uint32),
        tl.load(counters + 1 + place).to(tl.uint32),
        tl.load(counters + 2 + place).to(tl.uint32),
        tl.load(counters + 3 + place).to(tl.uint32),
    )
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, key.to(tl.uint32), (key >> 32).to(tl.uint32))
    tl.store(words + place, w0.to(tl.int64))
    tl.store(words + 1 + place, w1.to(tl.int64))
    tl.store(words + 2 + place, w2.to(tl.int64))
    tl.store(words + 3 + place, w3.to(tl.int64))


@triton.jit
def mask_kernel(mask, rows, first_column, group, site, seed, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None]
    keep = keep_mask(tl.load(rows + place), first_column, group, site, seed, threshold, COLUMNS)
    tl.store(mask + place * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep)


@triton.jit
def limits_kernel(words, threshold, reached, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    limits = tl.cast(threshold, tl.uint32) * 0x10001
    tl.store(reached + place, reached_limits(tl.load(words + place).to(tl.uint32), limits).to(tl.int64))


@triton.jit
def tile_kernel(
    mask, rows, first_column, group, site, seed, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OCTETS: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, ROWS)[:, None]
    keep = keep_tile(tl.load(rows + place), first_column, group, site, seed, threshold, COLUMNS, OCTETS)
    tl.store(mask + place * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep)


@pytest.mark.parametrize(("counter", "key", "words"), oracle.PHILOX_VECTORS, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter, key, words, kernel_device):
    unsigned = key[1] << 32 | key[0]
    seed = torch.tensor(unsigned - (1 << 64 if unsigned >= 1 << 63 else 0), device=kernel_device)
    drawn = torch.zeros(4, dtype=torch.int64, device=kernel_device)
    words_kernel[(1,)](torch.tensor(counter, device=kernel_device), seed, drawn)
    assert tuple(drawn.tolist()) == words


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    threshold=st.integers(0, 65535),
    row=st.integers(0, 0xFFFFFFFF - 4),
    octet=st.integers(0, 4096),
    group=st.integers(0, 2**31 - 1),
    site=st.integers(0, 9),
    columns=st.sampled_from([8, 16, 64]),
)
def test_masks_equal_the_references(seed, threshold, row, octet, group, site, columns):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = torch.arange(row, row + 4, device=device)
    drawn = torch.tensor(seed, device=device)
    group_tensor = torch.tensor(group, device=device)
    expected = reference.keep_mask(rows, 8 * octet + columns, group_tensor, threshold / 65536, drawn, site)
    mask = torch.zeros(4, columns, dtype=torch.bool, device=device)
    mask_kernel[(1,)](mask, rows, 8 * octet, group, site, drawn, threshold, ROWS=4, COLUMNS=columns)
    assert torch.equal(mask, expected[:, 8 * octet :])
    for octets in (1, 2, 4):
        if columns % (8 * octets) == 0:
            tile = torch.zeros_like(mask)
            tile_kernel[(1,)](
                tile, rows, 8 * octet, group, site, drawn, threshold, ROWS=4, COLUMNS=columns, OCTETS=octets
            )
            assert torch.equal(tile, mask)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_masks_equal_the_naive_ones(p, kernel_device):
    mask = torch.zeros(4, 64, dtype=torch.bool, device=kernel_device)
    rows, seed = torch.arange(4, device=kernel_device), torch.tensor(-7, device=kernel_device)
    mask_kernel[(1,)](mask, rows, 0, 5, 3, seed, threshold_and_scale(p)[0], ROWS=4, COLUMNS=64)
    expected = oracle.kept_elements(-7, p, 4, 64, 5, 3)
    assert torch.equal(mask.cpu(), expected)
    for octets in (1, 2, 4):
        tile = torch.zeros_like(mask)
        tile_kernel[(1,)](tile, rows, 0, 5, 3, seed, threshold_and_scale(p)[0], ROWS=4, COLUMNS=64, OCTETS=octets)
        assert torch.equal(tile.cpu(), expected)


@pytest.mark.parametrize("threshold", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_halves_are_compared_with_the_threshold_to_the_last(threshold, kernel_device):
    """Each half beside each neighbour that could borrow from it or lend to it."""
    halves = sorted(
        {min(max(half + step, 0), 0xFFFF) for half in (0, 0x8000, 0xFFFF, threshold) for step in (-1, 0, 1)}
    )
    pairs = [(low, high) for low in halves for high in halves]
    pairs += [(0, 0)] * (256 - len(pairs))
    words = torch.tensor([high << 16 | low for low, high in pairs], device=kernel_device)
    reached = torch.zeros_like(words)
    limits_kernel[(1,)](words, threshold, reached, SIZE=256)
    expected = [(high >= threshold) << 31 | (low >= threshold) << 15 for low, high in pairs]
    assert [int(bits) & 0x80008000 for bits in reached] == expected


@given(p=st.floats(0, 1))
def test_threshold_and_scale_are_the_references(p):
    assert threshold_and_scale(p) == (reference.threshold(p), reference.keep_scale(p))
