"""The kernels' activations and their derivatives, held against torch's in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import triton
import triton.language as tl

from tfm.kernels.activations import activate, activate_with_derivative
from tfm.reference.feed_forward import ACTIVATIONS

SIZE = 4096
# Largest |x|; each range is its own test, since errors are relative to the largest value.
RANGES = {"tiny": 1e-4, "small": 0.5, "usual": 6.0, "wide": 100.0, "largest of fp16": 65504.0}


@triton.jit
def both_kernel(x, value, derivative, alone, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    given = tl.load(x + place)
    f, slope = activate_with_derivative(given, ACTIVATION)
    tl.store(value + place, f)
    tl.store(derivative + place, slope)
    tl.store(alone + place, activate(given, ACTIVATION))


def kernel(activation, x):
    """f(x) and f'(x) in fp32."""
    value, derivative, alone = (torch.full_like(x, torch.nan) for _ in range(3))
    both_kernel[(1,)](x, value, derivative, alone, ACTIVATION=activation, SIZE=SIZE)
    assert torch.equal(alone.nan_to_num(), value.nan_to_num())
    return value, derivative


def plain(activation, x):
    x = x.detach().requires_grad_()
    value = ACTIVATIONS[activation](x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("largest", RANGES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_errs_no_more_than_torch(activation, largest, kernel_device):
    x = torch.linspace(-RANGES[largest], RANGES[largest], SIZE, device=kernel_device)
    truth, same = plain(activation, x.double()), plain(activation, x)
    oracle.assert_all_match(kernel(activation, x), truth, same, ("value", "derivative"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_limits(activation, kernel_device):
    x = torch.tensor([-1e18, 1e18], device=kernel_device).repeat(SIZE // 2)
    for result, truth in zip(kernel(activation, x), plain(activation, x.double()), strict=True):
        assert torch.equal(result, truth.float())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden(activation, kernel_device):
    assert kernel(activation, torch.full((SIZE,), torch.nan, device=kernel_device))[0].isnan().all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_tails_keep_their_digits(activation, kernel_device):
    x = torch.linspace(-5.0, -1.0, SIZE, device=kernel_device)
    value, _ = kernel(activation, x)
    truth = torch.special.ndtr(x.double()) * x.double() if activation == "gelu" else plain(activation, x.double())[0]
    assert ((value - truth) / truth).abs().max() < 1e-4
