"""The kernels' activations and their derivatives, held against torch's in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import triton
import triton.language as tl

from tfm.kernels.activations import activate, activate_with_derivative, exp, logistic, normal, tanh
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
    assert ((value - truth) / truth).abs().max() < 3e-6


@triton.jit
def functions_kernel(x, results, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    given = tl.load(x + place)
    tl.store(results + place, tanh(given))
    tl.store(results + SIZE + place, exp(-tl.abs(given), 0.0))
    tl.store(results + 2 * SIZE + place, logistic(given)[0])
    below, density = normal(given)
    tl.store(results + 3 * SIZE + place, below)
    tl.store(results + 4 * SIZE + place, density)
    tl.store(results + 5 * SIZE + place, tl.exp2(given))
    tl.store(results + 6 * SIZE + place, tl.log2(tl.abs(given)))


def distribution(x):
    """The standard normal one, whose tail torch.special.ndtr rounds to 0 in double precision."""
    tail = torch.special.erfcx(x.abs() * 0.5**0.5) / 2 * (-x * x / 2).exp()
    return torch.where(x < 0, tail, 1 - tail)


# How far each may be from the truth, in units of fp32's last place; on a GPU exp2 and division err 2 themselves.
FUNCTIONS = {
    "tanh": (torch.tanh, 2),
    "exp": (lambda x: (-x.abs()).exp(), 1),
    "logistic": (torch.sigmoid, 3),
    "normal distribution": (distribution, 7),
    "normal density": (lambda x: (-x * x / 2).exp() * (2 * torch.pi) ** -0.5, 2),
    "exp2": (torch.exp2, 2),
    "log2": (lambda x: x.abs().log2(), 2),
}
# Normal numbers of fp32 come out: the tail of the normal distribution ends at -12.8.
FUNCTION_RANGES = [1e-6, 0.1, 0.4, 0.7, 1.0, 3.0, 12.8]


@pytest.mark.parametrize("largest", FUNCTION_RANGES)
def test_functions_are_right_to_a_few_ulps(largest, kernel_device):
    x = torch.linspace(-largest, largest, SIZE, device=kernel_device)
    results = torch.full((len(FUNCTIONS), SIZE), torch.nan, device=kernel_device)
    functions_kernel[(1,)](x, results, SIZE=SIZE)
    hardware = 4 if kernel_device.type == "cuda" else 0
    for (name, (function, allowed)), found in zip(FUNCTIONS.items(), results.cpu().double(), strict=True):
        truth = function(x.cpu().double())
        ulp = torch.finfo(torch.float32).eps * torch.exp2(truth.abs().clamp(min=1e-45).log2().floor())
        worst = ((found - truth).abs() / ulp).max().item()
        assert worst <= allowed + hardware, f"{name}: {worst:.2f} ulps"


def test_exponentials_keep_their_digits_far_out(kernel_device):
    x = torch.linspace(-87.0, 87.0, SIZE, device=kernel_device)
    results = torch.full((len(FUNCTIONS), SIZE), torch.nan, device=kernel_device)
    functions_kernel[(1,)](x, results, SIZE=SIZE)
    for row, function in ((1, FUNCTIONS["exp"][0]), (2, torch.sigmoid)):
        truth = function(x.double())
        assert ((results[row] - truth) / truth).abs().max() <= 3 * torch.finfo(torch.float32).eps
