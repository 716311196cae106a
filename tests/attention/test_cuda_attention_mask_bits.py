"""CUDA's masks as bits, on a GPU or else emulated, against bits packed one by one."""

from __future__ import annotations

import emulated
import pytest
import torch
from oracle import allowed_keys

# Shape of the mask, whether it is a float one, start of each sequence, window.
CASES = {
    "bool of each head": ((2, 3, 5, 70), None, None, 0, (None, None)),
    "bool, 300 keys, window": ((1, 2, 17, 300), None, None, 40, (30, 3)),
    "bool shared by sequences, starts": ((1, 1, 9, 33), None, [4, -3, 20], 0, (None, 0)),
    "one row": ((2, 1, 1, 40), None, [7, 9], 0, (5, 0)),
    "float, causal": ((2, 2, 6, 33), torch.float32, None, 2, (None, 0)),
    "half, left": ((1, 2, 4, 257), torch.float16, None, 100, (60, None)),
    "no queries": ((2, 1, 0, 10), None, None, 0, (None, None)),
}  # fmt: skip


@pytest.fixture
def operators(cuda_device, monkeypatch):
    return emulated.operators("attention/mask_bits", cuda_device, monkeypatch)


def packed(bits):
    """bool [..., keys] as int32 [..., W], rows of whole 256 keys, bit j % 32 of word j // 32 from key j."""
    keys = bits.shape[-1]
    words = torch.zeros(*bits.shape[:-1], -(-keys // 256) * 8, dtype=torch.int64)
    for key in range(keys):
        words[..., key // 32] |= bits[..., key].long() << key % 32
    return words.to(torch.int32)


@pytest.mark.parametrize("name", CASES)
def test_bits_are_the_masks(operators, cuda_device, name):
    shape, dtype, starts, start, (left, right) = CASES[name]
    mask = torch.rand(shape) < 0.4
    one_row = shape[2] == 1
    sequences = shape[0] if starts is None or one_row else len(starts)
    window = (-1 if left is None else left, -1 if right is None else right)
    allowed = mask
    if not one_row:
        full = (sequences, *shape[1:])
        allowed = allowed_keys(full, query_start=starts or start, window_size=window, mask=mask.expand(full))
    given = mask if dtype is None else torch.zeros(shape, dtype=dtype).masked_fill(~mask, float("-inf"))
    starts = None if starts is None else torch.tensor(starts, device=cuda_device)
    words, reach = operators.attention_mask_bits(given.to(cuda_device), starts, start, left, right)
    assert torch.equal(reach.cpu(), packed(allowed.any(dim=2)))
    if dtype is None and not one_row:
        assert torch.equal(words.cpu(), packed(mask))
    else:
        assert words.numel() == 0
