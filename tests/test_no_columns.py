"""Tensors of no columns are tensors: every operation gives on them what torch gives, or refuses them in words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tfm import native, ops

NO_NATIVE = native.why_unavailable(torch.device("cpu"))
BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.triton),
    pytest.param("native", marks=pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE)),
]


@pytest.fixture(params=BACKENDS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(impl: str, kernel_device: torch.device) -> torch.device:
    return kernel_device if impl == "triton" else torch.device("cpu")


@pytest.mark.parametrize("value_dim", [0, 3])
def test_heads_of_no_columns_attend_to_all_keys_alike(impl, device, value_dim):
    query, key = torch.randn(1, 2, 3, 0, device=device), torch.randn(1, 2, 5, 0, device=device)
    value = torch.randn(1, 2, 5, value_dim, device=device, requires_grad=True)
    # Not by torch, whose attention of 2.12 gives 0.
    expected = value.detach().cpu().mean(2, keepdim=True).expand(1, 2, 3, value_dim)
    output = ops.attention(query, key, value, impl=impl)
    assert_close(output.detach().cpu(), expected)
    output.sum().backward()
    assert_close(value.grad.cpu(), torch.full_like(value, 3 / 5, device="cpu"))
    ends = (torch.tensor([0, length], dtype=torch.int32, device=device) for length in (3, 5))
    packed = [x.detach()[0].transpose(0, 1) for x in (query, key, value)]
    assert_close(ops.varlen_attention(*packed, *ends, 3, 5, impl=impl).transpose(0, 1).cpu(), expected[0])
    caches = [x.detach().transpose(1, 2).contiguous() for x in (key, value)]
    lengths = torch.tensor([5], dtype=torch.int32, device=device)
    assert_close(ops.decode_attention(query[:, :, 0], *caches, lengths, impl=impl).cpu(), expected[:, :, 0])


def test_a_loss_of_no_columns_is_that_of_the_bias(impl, device):
    input, weight = torch.randn(3, 0, device=device), torch.randn(7, 0, device=device, requires_grad=True)
    bias = torch.randn(7, device=device, requires_grad=True)
    target = torch.tensor([1, 6, 0], device=device)
    loss = ops.linear_cross_entropy(input, weight, target, linear_bias=bias, impl=impl)
    expected = F.cross_entropy(bias.expand(3, 7), target)
    assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(expected, bias)
    assert_close(torch.autograd.grad(loss, [weight, bias]), (torch.zeros_like(weight), gradient))


def test_an_embedding_of_no_columns_is_empty(impl, device):
    tokens, positions = torch.tensor([[4, 0]], device=device), torch.arange(2, device=device)
    assert ops.embedding(tokens, torch.randn(5, 0, device=device), positions, impl=impl).shape == (1, 2, 0)
    assert ops.sinusoid(positions, 0).shape == (2, 0)
