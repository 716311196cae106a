"""How the embedding's gradient finds the tokens of a row: by binary search, whatever lies between two tokens."""

from __future__ import annotations

import allocations
import pytest
import torch
import triton
import triton.language as tl

from tfm.kernels.embedding import find

WANTED = 8


@triton.jit
def find_kernel(tokens, wanted, starts, ends, count, bits, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    start, end = find(tokens, tl.load(wanted + place), count, bits)
    tl.store(starts + place, start)
    tl.store(ends + place, end)


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 64, 65])
def test_tokens_are_found(count, kernel_device):
    tokens = torch.randint(-3, 12, (count,), device=kernel_device).sort().values.int()
    wanted = torch.arange(WANTED, device=kernel_device)
    starts, ends = torch.full((2, WANTED), -1, dtype=torch.int32, device=kernel_device).unbind()
    find_kernel[(1,)](tokens, wanted, starts, ends, count, count.bit_length(), SIZE=WANTED)
    assert starts.tolist() == torch.searchsorted(tokens, wanted.int()).tolist()
    assert ends.tolist() == torch.searchsorted(tokens, wanted.int(), right=True).tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads the log of the CPU's allocator")
def test_a_sparse_gradient_takes_no_memory_of_the_vocabularys_size():
    rows, tokens, dy = 50_000, torch.tensor([0, 49_999, 3]), torch.randn(3, 4)
    arguments = (dy, tokens, None, 1.0, 0.0, 0, rows, None, torch.float32, True)
    values, indices = torch.ops.tfm.embedding_backward.default(*arguments)
    assert indices.tolist() == [[0, 3, 49_999]]
    assert torch.equal(values, dy[[0, 2, 1]])
    assert allocations.peak_bytes(lambda: torch.ops.tfm.embedding_backward.default(*arguments)) < rows
