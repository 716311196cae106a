"""Half a network, linear layer and activation, and gated networks with biases: every backend against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from feed_forward_cases import SEED, SITE, take

from tfm import native, ops
from tfm.ops.feed_forward import ACTIVATIONS

WAYS = ["epilogue", "library", "native"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The backend, by the way that it takes."""
    if request.param == "native":
        reason = native.why_unavailable(torch.device("cpu"))
        if reason:
            pytest.skip(reason)
        return "native"
    pytest.importorskip("triton")
    take(request.param, monkeypatch)
    return "triton"


def run(function, inputs, cotangent):
    output = function(*inputs)
    needed = [x for x in inputs if x is not None and x.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, needed, cotangent.to(output.dtype))]


def expected(function, inputs, names, columns):
    cotangent = torch.randn(*inputs[0].shape[:-1], columns)
    wide = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    truth = run(lambda *given: function(*given, impl="reference"), wide, cotangent)
    same = run(lambda *given: function(*given, impl="reference"), inputs, cotangent)
    given = [name for name, x in zip(names, inputs, strict=True) if x is not None and x.requires_grad]
    return cotangent, truth, same, ["output", *given]


def layer(activation, p):
    return lambda x, weight, bias, impl: ops.linear_activation(
        x, weight, bias, activation, p, seed=SEED, site=SITE, impl=impl
    )


def tensors(*shapes, dtype=torch.float32):
    return [(torch.randn(shape) * max(1, shape[-1]) ** -0.5).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shape", [((5,), 9, 17), ((2, 3), 16, 33), ((0,), 4, 6), ((70,), 8, 64)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_layer_and_its_activation(way, shape, p):
    rows, depth, columns = shape
    inputs = tensors((*rows, depth), (columns, depth), (columns,))
    function = layer("gelu", p)
    cotangent, truth, same, names = expected(function, inputs, ("x", "weight", "bias"), columns)
    actual = run(lambda *given: function(*given, impl=way), inputs, cotangent)
    oracle.assert_all_match(actual, truth, same, names)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_activation_and_a_weight_that_lies_transposed(way, activation, dtype):
    x, transposed, bias = tensors((7, 12), (12, 20), (20,), dtype=dtype)
    function = layer(activation, 0.2)

    def of_view(x, transposed, bias, impl):
        return function(x, transposed.t(), bias, impl)

    inputs = [x, transposed, bias]
    cotangent, truth, same, names = expected(of_view, inputs, ("x", "weight", "bias"), 20)
    actual = run(lambda *given: of_view(*given, impl=way), inputs, cotangent)
    oracle.assert_all_match(actual, truth, same, names)


def test_what_needs_no_gradient_has_none(way):
    x, weight, bias = tensors((3, 4), (5, 4), (5,))
    y = ops.linear_activation(x.detach(), weight, None, "silu", impl=way)
    (found,) = torch.autograd.grad(y.sum(), weight)
    assert found.shape == weight.shape
    y = ops.linear_activation(x.detach(), weight.detach(), bias, "silu", impl=way)
    y += 1
    assert torch.autograd.grad(y.sum(), bias)[0].shape == bias.shape


@pytest.mark.parametrize("joined", [False, True], ids=["two weights", "one weight"])
@pytest.mark.parametrize("given", ["gate_bias", "up_bias", "down_bias", "all"])
def test_gated_networks_with_biases(way, joined, given):
    x, gate, up, down, gate_bias, up_bias, down_bias = tensors((6, 8), (20, 8), (20, 8), (5, 20), (20,), (20,), (5,))
    chosen = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    inputs = [x, gate, up, down, *(b if given in (name, "all") else None for name, b in chosen.items())]
    if joined and given == "up_bias":
        pytest.skip("gate_bias holds both")

    def function(x, gate, up, down, gate_bias, up_bias, down_bias, impl):
        if joined:
            gate, up = torch.cat((gate, up)), None
            zeros = torch.zeros(20, dtype=x.dtype)
            if gate_bias is not None:
                gate_bias, up_bias = torch.cat((gate_bias, zeros if up_bias is None else up_bias)), None
        return ops.gated_feed_forward(
            x, gate, up, down, "silu", 0.3, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias,
            seed=SEED, site=SITE, impl=impl,
        )  # fmt: skip

    names = ("x", "gate", "up", "down", *chosen)
    cotangent, truth, same, names = expected(function, inputs, names, 5)
    actual = run(lambda *given: function(*given, impl=way), inputs, cotangent)
    oracle.assert_all_match(actual, truth, same, names)
