"""The feed-forward networks against torch's linear layers and activations."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops
from tfm.ops.feed_forward import ACTIVATIONS

# The definitions, from their papers where torch has no function.
TRUTH = {
    "relu": F.relu,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: x / (1 + (-x).exp()),
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": torch.tanh,
}


def weights(dim=3, hidden=7, out=4, dtype=torch.float64):
    shapes = (hidden, dim), (hidden,), (out, hidden), (out,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(TRUTH)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_equals_torch(activation, biased):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    w1, b1, w2, b2 = weights()
    if not biased:
        b1 = b2 = None
    wanted = [t for t in (x, w1, b1, w2, b2) if t is not None]
    output = ops.feed_forward(x, w1, b1, w2, b2, activation)
    expected = F.linear(TRUTH[activation](F.linear(x, w1, b1)), w2, b2)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    grads, expected_grads = (torch.autograd.grad(y, wanted, cotangent) for y in (output, expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_equals_torch(activation):
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    gate, _, down, _ = weights()
    up = weights()[0]
    wanted = [x, gate, up, down]
    output = ops.gated_feed_forward(*wanted, activation)
    expected = (TRUTH[activation](x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    grads, expected_grads = (torch.autograd.grad(y, wanted, cotangent) for y in (output, expected))
    torch.testing.assert_close(grads, expected_grads)


@settings(deadline=None, max_examples=20)
@given(shape=st.lists(st.integers(0, 4), max_size=3), sizes=st.tuples(*[st.integers(1, 5)] * 3))
def test_any_shape(shape, sizes):
    parameters = weights(*sizes)
    x = torch.randn(*shape, sizes[0], dtype=torch.float64)
    expected = F.linear(F.relu(F.linear(x, *parameters[:2])), *parameters[2:])
    torch.testing.assert_close(ops.feed_forward(x, *parameters), expected)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_falls_on_the_hidden_activations(p):
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    w1, b1, w2, b2 = weights()
    hidden = ops.dropout(torch.tanh(F.linear(x, w1, b1)), p, seed=-8, site=4)
    output = ops.feed_forward(x, w1, b1, w2, b2, "tanh", p, seed=-8, site=4)
    torch.testing.assert_close(output, F.linear(hidden, w2, b2))
    gated = ops.dropout(F.silu(x @ w1.T) * (x @ w1.T), p, seed=-8, site=4)
    torch.testing.assert_close(ops.gated_feed_forward(x, w1, w1, w2, "silu", p, seed=-8, site=4), gated @ w2.T)


def test_gradcheck():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    w1, b1, w2, b2 = weights(hidden=4, out=2)
    function = lambda *inputs: ops.feed_forward(*inputs, "gelu", 0.3, seed=5)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w1, b1, w2, b2))
    gated = lambda *inputs: ops.gated_feed_forward(*inputs, "silu", 0.3, seed=5)  # noqa: E731
    assert torch.autograd.gradcheck(gated, (x, w1, w1, w2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu_squared"])
def test_errs_no_more_than_torch(dtype, weight_dtype, activation):
    x = torch.randn(17, 33).to(dtype).requires_grad_()
    parameters = [t.detach() / 6 for t in weights(33, 65, 17, dtype)]
    if weight_dtype == "float32":
        parameters = [t.float() for t in parameters]
    inputs = [x, *(t.requires_grad_() for t in parameters)]
    plain = lambda x, *rest: _torch(x, *(t.to(x.dtype) for t in rest), activation)  # noqa: E731
    wide = [t.detach().double().requires_grad_() for t in inputs]
    cotangent = torch.randn(17, 17).to(dtype)
    results = []
    for function, some in ((lambda *a: ops.feed_forward(*a, activation), inputs), (plain, wide), (plain, inputs)):
        output = function(*some)
        results.append([output, *torch.autograd.grad(output, some, cotangent.to(output.dtype))])
    assert results[0][0].dtype == dtype
    oracle.assert_all_match(*results, ("output", "x", "w1", "b1", "w2", "b2"))


def _torch(x, w1, b1, w2, b2, activation):
    functions = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "relu_squared": lambda h: F.relu(h).square()}
    return F.linear(functions[activation](F.linear(x, w1, b1)), w2, b2)
