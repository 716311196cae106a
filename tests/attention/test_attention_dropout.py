"""Attention's kernels of any length drop what the reference drops, bit for bit, forward and backward."""

from __future__ import annotations

import pytest
import torch
from attention_cases import SEED
from long_attention import kernels_of_any_length
from oracle import DTYPES

from tfm import ops
from tfm.kernels.launch.attention.any_length import AttentionTiles
from tfm.reference.dropout import keep_mask

HEADS, QUERIES, KEYS = 2, 60, 64
# A thread decides one, two and four octets of a query's keys.
TILES = {octets: AttentionTiles(block_queries, 32, 4, 2) for octets, block_queries in ((1, 32), (2, 64), (4, 128))}


def test_tiles_have_their_octets():
    assert {octets: tiles.tile[2] for octets, tiles in TILES.items()} == {octets: octets for octets in TILES}


@pytest.mark.parametrize("octets", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_drops_what_the_reference_drops(dtype, octets, kernel_device):
    """All scores are 0; where keys or queries and values are unit vectors, results show which weights are left."""
    seed = torch.tensor(SEED, device=kernel_device)
    rows = torch.arange(QUERIES, device=kernel_device).expand(2 * HEADS, -1)
    groups = torch.arange(2 * HEADS, device=kernel_device)[:, None]
    kept = keep_mask(rows, KEYS, groups, 0.3, seed, 5).view(2, HEADS, QUERIES, KEYS)

    def attend(query, key, value, cotangent):
        inputs = [x.to(dtype).expand(2, HEADS, -1, -1).contiguous().requires_grad_() for x in (query, key, value)]
        names = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
        with kernels_of_any_length(dict.fromkeys(names, TILES[octets])):
            output = ops.attention(*inputs, dropout_p=0.3, seed=seed, site=5, impl="triton")
            return output, *torch.autograd.grad(output, inputs, cotangent.to(dtype).expand_as(output))

    ones, units = torch.ones(1, KEYS, device=kernel_device), torch.eye(KEYS, device=kernel_device)
    output, dquery, _, _ = attend(torch.zeros_like(units)[:QUERIES], units, units, ones.expand(QUERIES, -1))
    assert torch.equal(output > 0, kept)
    assert torch.equal(dquery > 0, kept)
    _, _, dkey, dvalue = attend(units[:QUERIES], torch.zeros_like(units), ones.expand(KEYS, -1), units[:QUERIES])
    assert torch.equal(dvalue.mT[..., :QUERIES, :] > 0, kept)
    assert torch.equal(dkey.mT[..., :QUERIES, :] > 0, kept)
