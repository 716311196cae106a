"""The feed-forward networks' Triton kernels against the oracle: with an epilogue, and beside the library's matmul."""

from __future__ import annotations

from contextlib import nullcontext

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from feed_forward_cases import (
    BACKWARD,
    FORWARD,
    NAMES,
    SEED,
    SITE,
    SUMS,
    KeptShapes,
    assert_kernel_matches,
    inputs_of,
    network,
    run,
    take,
)
from oracle import DTYPES, HALVES

from tfm import ops
from tfm.ops.feed_forward import ACTIVATIONS
from tfm.reference.dropout import keep_scale


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


SHAPES = [(1, 1, 1, 1), (3, 17, 33, 5), ((17,), 40, 70, 19), ((2, 3, 5), 64, 16, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_matches(shape, dtype, path, kernel_device, launched):
    assert_kernel_matches(inputs_of(*shape, kernel_device, dtype))
    assert launched == FORWARD[path] + BACKWARD[path] + SUMS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_kernel_matches(shape, dtype, path, kernel_device, launched):
    assert_kernel_matches(inputs_of(*shape, kernel_device, dtype, gated=True), gated=True)
    assert launched == FORWARD[path] + BACKWARD[path]


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_activation(activation, gated, half, path, kernel_device, launched):
    assert_kernel_matches(inputs_of(9, 20, 35, 9, kernel_device, half, gated=gated), activation, 0.5, gated)
    assert launched == FORWARD[path] + BACKWARD[path] + ([] if gated else SUMS)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_biases_and_dropout_are_optional(activation, p, biased, path, kernel_device, launched):
    x, w1, b1, w2, b2 = inputs_of(9, 20, 35, 9, kernel_device)
    assert_kernel_matches([x, w1, b1, w2, b2] if biased else [x, w1, None, w2, None], activation, p)
    # The library has an epilogue of its own for bias and ReLU.
    forward = [] if activation == "relu" and biased and p == 0.0 else FORWARD[path]
    assert launched == forward + BACKWARD[path] + (SUMS if biased else [])


def test_packed_weights_are_both(path, kernel_device):
    x, gate, up, down = inputs_of(9, 20, 35, 9, kernel_device, gated=True)
    packed = torch.cat((gate, up)).detach().requires_grad_()
    cotangent = torch.randn(9, 9, device=kernel_device)
    assert_kernel_matches([x, packed, None, down], gated=True, cotangent=cotangent)
    _, _, dgate, dup, _ = run(network(gated=True), [x, gate, up, down], cotangent)
    _, _, dpacked, _ = run(network(gated=True), [x, packed, None, down], cotangent)
    torch.testing.assert_close(dpacked, torch.cat((dgate, dup)))


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_weights_of_another_dtype(gated, half, path, kernel_device):
    inputs = inputs_of(9, 20, 35, 9, kernel_device, half, torch.float32, gated)
    assert_kernel_matches(inputs, gated=gated)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_autocast(activation, half, path, kernel_device):
    inputs = inputs_of(9, 20, 35, 9, kernel_device)
    cotangent = torch.randn(9, 9, device=kernel_device)
    truth = run(
        network(activation, impl="reference"),
        [tensor.detach().double().requires_grad_() for tensor in inputs],
        cotangent,
    )
    results = []
    for impl in ("triton", "reference"):
        with torch.autocast(kernel_device.type, dtype=half):
            output = network(activation, impl=impl)(*inputs)
            results.append([output.detach(), *torch.autograd.grad(output, inputs, cotangent.to(half))])
    assert [result.dtype for result in results[0]] == [half, *[torch.float32] * 5]
    # The gradients are the half's, in fp32.
    actual, same = ([result.to(half) for result in results_of] for results_of in results)
    oracle.assert_all_match(actual, truth, same, ("output", *NAMES[False]))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_kernels_draw_the_references_mask(activation, path, kernel_device):
    rows, columns, p = 19, 41, 0.4
    x, identity = torch.ones(rows, columns, device=kernel_device), torch.eye(columns, device=kernel_device)
    x.requires_grad_()
    y = network(activation, p)(x, 100 * identity, None, identity, None)
    kept = oracle.kept_elements(SEED, p, rows, columns, site=SITE).to(kernel_device)
    assert torch.equal(y.detach() != 0, kept)
    if activation == "relu":
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, kept * 100 * keep_scale(p))


VIEWS = {
    "row stride": lambda x: F.pad(x, (0, 6))[..., :20],
    "column stride": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_strides(view, gated, path, kernel_device):
    inputs = inputs_of((3, 4), 20, 35, 20, kernel_device, gated=gated)
    cotangent = VIEWS[view](torch.randn(3, 4, 20, device=kernel_device))
    x, *parameters = (tensor.detach() for tensor in inputs)
    viewed = [VIEWS[view](x), *(F.pad(parameter, (0, 3))[..., :-3] for parameter in parameters)]
    viewed[1] = viewed[1].t().contiguous().t()
    assert_kernel_matches([tensor.requires_grad_() for tensor in viewed], gated=gated, cotangent=cotangent)


def test_no_rows(path, kernel_device):
    inputs = inputs_of((2, 0), 20, 35, 9, kernel_device)
    output, dx, *gradients = run(network(), inputs, torch.zeros(2, 0, 9, device=kernel_device))
    assert output.shape == (2, 0, 9)
    assert dx.shape == (2, 0, 20)
    for gradient, tensor in zip(gradients, inputs[1:], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))
    gated = inputs_of((2, 0), 20, 35, 9, kernel_device, gated=True)
    results = run(network(gated=True), gated, torch.zeros(2, 0, 9, device=kernel_device))
    assert not any(result.any() for result in results)


@pytest.mark.parametrize("sizes", [(0, 7, 4), (3, 0, 4), (3, 7, 0)], ids=str)
def test_no_elements_are_the_references(sizes, kernel_device):
    inputs = inputs_of(2, *sizes, kernel_device)
    assert ops.feed_forward(*inputs).shape == (2, sizes[2])
    with pytest.raises(
        ValueError, match=r"^feed_forward cannot run with impl='triton': expected weights with elements"
    ):
        ops.feed_forward(*inputs, impl="triton")


def test_same_inputs_same_bits(path, kernel_device):
    inputs = inputs_of(70, 20, 35, 9, kernel_device)
    cotangent = torch.randn(70, 9, device=kernel_device)
    first, second = (run(network(), inputs, cotangent) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_rows_do_not_see_their_batch(epilogue, kernel_device):
    x, w1, b1, *_ = (tensor.detach() for tensor in inputs_of(100, 20, 35, 9, kernel_device))
    seed = torch.tensor(SEED, device=kernel_device)
    for rows in (7, 33):
        many, few = (
            torch.ops.tfm.linear_activation(some, w1, None, b1, False, "gelu", 0.3, seed, SITE, True)
            for some in (x, x[:rows])
        )
        for all_rows, first_rows in zip(many, few, strict=True):
            assert torch.equal(all_rows[:rows], first_rows)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_backward_sees_the_pre_activation_as_stored(half, path, kernel_device):
    x, w1, b1, *_ = (tensor.detach() for tensor in inputs_of(9, 20, 35, 9, kernel_device, half))
    hidden, pre = torch.ops.tfm.linear_activation(x, w1, None, b1, False, "gelu", 0.0, None, 0, True)
    torch.testing.assert_close(
        hidden, torch.ops.tfm.activation_dropout(pre, False, "gelu", 0.0, None, 0), rtol=0, atol=0
    )


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("recording", [True, False])
def test_keeps_a_pre_activation_only_for_a_backward(needed, recording, path, kernel_device):
    inputs = [tensor.detach().requires_grad_(needed) for tensor in inputs_of(5, 17, 20, 9, kernel_device)]
    with KeptShapes("tfm") as kept, nullcontext() if recording else torch.no_grad():
        network()(*inputs)
    assert kept.shapes == [(5, 20) if needed and recording else (0,)]
