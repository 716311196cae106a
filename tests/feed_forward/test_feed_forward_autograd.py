"""The feed-forward networks' Triton kernels as torch's autograd, dispatcher and compiler see them."""

from __future__ import annotations

from itertools import combinations

import launches
import pytest
import torch
from feed_forward_cases import BACKWARD, FORWARD, NAMES, SEED, SITE, SUMS, inputs_of, network, run, take
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tfm import ops
from tfm.operators.autograd import apply
from tfm.operators.feed_forward import FeedForward, Network


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


@pytest.fixture(params=["epilogue", "library"])
def path(request, monkeypatch):
    take(request.param, monkeypatch)
    return request.param


@pytest.fixture
def epilogue(monkeypatch):
    take("epilogue", monkeypatch)


def subsets(names):
    return [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]


GELU_SUBSETS = [("gelu", subset) for subset in subsets(NAMES[False])]
RELU_SUBSETS = [("relu", subset) for subset in [("x",), ("w1", "b1"), ("w2",), ("b2",), ("w1", "w2")]]


@pytest.mark.parametrize(("activation", "subset"), GELU_SUBSETS + RELU_SUBSETS, ids=str)
def test_only_wanted_gradients_are_computed(activation, subset, epilogue, kernel_device, launched):
    inputs = inputs_of(5, 17, 20, 9, kernel_device)
    cotangent = torch.randn(5, 9, device=kernel_device)
    expected = dict(zip(NAMES[False], run(network(activation), inputs, cotangent)[1:], strict=True))
    launched.clear()
    some = [tensor.detach().requires_grad_(name in subset) for name, tensor in zip(NAMES[False], inputs, strict=True)]
    actual = run(network(activation), some, cotangent)[1:]
    for name, gradient in zip(subset, actual, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)
    backward = BACKWARD["epilogue"] if {"x", "w1", "b1"} & set(subset) else []
    if not backward and "w2" in subset and activation != "relu":
        backward = FORWARD["library"]
    assert launched == FORWARD["epilogue"] + backward + (SUMS if "b1" in subset else [])


@pytest.mark.parametrize("subset", subsets(NAMES[True]), ids="+".join)
def test_only_wanted_gated_gradients_are_computed(subset, epilogue, kernel_device):
    inputs = inputs_of(5, 17, 20, 9, kernel_device, gated=True)
    cotangent = torch.randn(5, 9, device=kernel_device)
    expected = dict(zip(NAMES[True], run(network(gated=True), inputs, cotangent)[1:], strict=True))
    some = [tensor.detach().requires_grad_(name in subset) for name, tensor in zip(NAMES[True], inputs, strict=True)]
    for name, gradient in zip(subset, run(network(gated=True), some, cotangent)[1:], strict=True):
        torch.testing.assert_close(gradient, expected[name])


LAUNCHES = {
    # Of Triton's kernels and of the library's matmuls, forward and backward; the output bias's sum is torch's.
    ("relu", 0.0, False, "epilogue"): ([], BACKWARD["epilogue"] + SUMS, 2, 3),
    ("relu", 0.1, False, "epilogue"): (FORWARD["epilogue"], BACKWARD["epilogue"] + SUMS, 1, 3),
    ("gelu", 0.1, False, "epilogue"): (FORWARD["epilogue"], BACKWARD["epilogue"] + SUMS, 1, 3),
    ("gelu", 0.1, False, "library"): (FORWARD["library"], BACKWARD["library"] + SUMS, 2, 4),
    ("silu", 0.0, True, "epilogue"): (FORWARD["epilogue"], BACKWARD["epilogue"], 1, 4),
    ("silu", 0.0, True, "library"): (FORWARD["library"], BACKWARD["library"], 3, 5),
}


@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_launches(case, kernel_device, launched, monkeypatch):
    activation, p, gated, path = case
    take(path, monkeypatch)
    inputs = inputs_of(9, 20, 35, 9, kernel_device, gated=gated)

    def count(function):
        launched.clear()
        with torch.profiler.profile() as profile:
            result = function()
        products = {"aten::mm", "aten::addmm", "aten::_addmm_activation"}
        return result, list(launched), sum(event.name in products for event in profile.events())

    output, forward, forward_products = count(lambda: network(activation, p, gated)(*inputs))
    _, backward, backward_products = count(lambda: torch.autograd.grad(output.sum(), inputs))
    assert (forward, backward, forward_products, backward_products) == LAUNCHES[case]


def test_operators_obey_torch(path, kernel_device):
    x, w1, b1, w2, _ = (tensor.detach() for tensor in inputs_of(5, 17, 20, 9, kernel_device))
    dy, seed = torch.randn(5, 9, device=kernel_device), torch.tensor(SEED, device=kernel_device)
    for activation, p, drawn, bias in (
        ("gelu", 0.3, seed, b1.half()),
        ("relu", 0.0, None, b1),
        ("relu", 0.3, seed, None),
    ):
        settings = activation, p, drawn, SITE
        forward = torch.ops.tfm.linear_activation.default
        torch.library.opcheck(forward, (x, w1, None, bias, False, *settings, True))
        hidden, pre = forward(x, w1, None, bias, False, *settings, True)
        saved = hidden if activation == "relu" else pre
        backward = torch.ops.tfm.linear_activation_backward.default
        torch.library.opcheck(backward, (dy, w2, saved, False, *settings, activation != "relu", torch.float16))
    forward, settings = torch.ops.tfm.linear_activation.default, ("silu", 0.3, seed, SITE)
    torch.library.opcheck(forward, (x, w1, w1.clone(), None, True, *settings, False))
    torch.library.opcheck(torch.ops.tfm.activation_dropout.default, (w1, False, *settings))
    _, pre = forward(x, torch.cat((w1, w1)), None, None, True, *settings, True)
    torch.library.opcheck(torch.ops.tfm.linear_activation_backward.default, (dy, w2, pre, True, *settings, False, None))


COMPILED = [("aot_eager", "relu", False), ("inductor", "gelu", False), ("inductor", "silu", True)]


@pytest.mark.parametrize(("backend", "activation", "gated"), COMPILED)
def test_compiles_whole(backend, activation, gated, kernel_device):
    inputs = inputs_of(5, 17, 20, 9, kernel_device, gated=gated)
    cotangent = torch.randn(5, 9, device=kernel_device)
    torch._dynamo.reset()
    function = network(activation, gated=gated)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs, cotangent), run(function, inputs, cotangent))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_checkpoint_draws_the_same_mask(activation, epilogue, kernel_device, launched):
    inputs = inputs_of(5, 17, 20, 9, kernel_device)
    function = lambda *inputs: ops.feed_forward(*inputs, activation, 0.5, impl="triton")  # noqa: E731
    cotangent = torch.randn(5, 9, device=kernel_device)
    results = []
    for wrapped in (function, lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(run(wrapped, inputs, cotangent))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    backward = BACKWARD["epilogue"] + SUMS
    assert launched == FORWARD["epilogue"] + backward + 2 * FORWARD["epilogue"] + backward


def test_gradients_in_an_autocast_region_keep_their_dtypes(path, kernel_device):
    inputs = inputs_of(5, 17, 20, 9, kernel_device)
    cotangent = torch.randn(5, 9, device=kernel_device)
    expected = run(network(), inputs, cotangent)
    output = network()(*inputs)
    with torch.autocast(kernel_device.type, dtype=torch.float16):
        gradients = torch.autograd.grad(output, inputs, cotangent)
    torch.testing.assert_close(list(gradients), expected[1:], rtol=0, atol=0)


def test_explicit_triton_says_why_not(kernel_device):
    inputs = inputs_of(5, 17, 20, 9, kernel_device, torch.float64)
    with pytest.raises(ValueError, match=r"^feed_forward cannot run with impl='triton': .*got float64$"):
        ops.feed_forward(*inputs, impl="triton")
    with pytest.raises(ValueError, match=r"^gated_feed_forward cannot run with impl='triton': .*got float64$"):
        ops.gated_feed_forward(*inputs_of(5, 17, 20, 9, kernel_device, torch.float64, gated=True), impl="triton")


def test_the_function_itself_is_for_one_backward_alone(kernel_device):
    x, w1, b1, w2, b2 = inputs_of(5, 17, 20, 9, kernel_device)

    def function(x):
        return apply(FeedForward, "tfm", Network(x, w1, None, b1, w2, b2, False, "gelu", 0.0, None, 0))

    with pytest.raises(RuntimeError, match="must override the setup_context"):
        torch.vmap(function)(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        function(forward_ad.make_dual(x.detach(), x.detach()))
