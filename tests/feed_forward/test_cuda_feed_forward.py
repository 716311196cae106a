"""CUDA's activation, gate and dropout beside torch's products, against the oracle: on a GPU, or else emulated.

Emulated, each launch is checked for races and for barriers that not all threads reach: see tests/cuda_emulation.
"""

from __future__ import annotations

import emulated
import oracle
import pytest
import torch
import torch.nn.functional as F
from feed_forward_cases import NAMES, SEED, SITE, assert_kernel_matches, inputs_of, network, run

from tfm.ops.feed_forward import ACTIVATIONS
from tfm.reference.dropout import keep_scale

SINGLE, HALF, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [SINGLE, HALF, BFLOAT16]


@pytest.fixture(autouse=True)
def operators(cuda_device, monkeypatch, filled_with_nan):
    return emulated.operators("feed_forward", cuda_device, monkeypatch)


def assert_matches(inputs, activation="gelu", p=0.3, gated=False, cotangent=None):
    assert_kernel_matches(inputs, activation, p, gated, cotangent, "native")


def settings_of(device, activation="gelu", p=0.3, gated=False):
    return gated, activation, p, torch.tensor(SEED, device=device), SITE


# Hidden columns by elements and by vectors, of one strip and of several; more rows than a block takes at once.
SHAPES = [
    (1, 1, 1, 1), (3, 17, 33, 5), ((17,), 40, 70, 19), ((2, 3, 5), 64, 16, 33), (9, 12, 264, 8), (70, 8, 64, 8),
    (300, 8, 256, 4),
    pytest.param((20_000, 64, 1408, 64), marks=pytest.mark.gpu),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_kernel_matches(cuda_device, gated, dtype, shape):
    assert_matches(inputs_of(*shape, cuda_device, dtype, gated=gated), gated=gated)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_activation(cuda_device, activation, gated):
    for dtype in DTYPES:
        assert_matches(inputs_of(9, 20, 40, 9, cuda_device, dtype, gated=gated), activation, 0.5, gated)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_biases_and_dropout_are_optional(cuda_device, activation, p, biased):
    x, w1, b1, w2, b2 = inputs_of(9, 20, 35, 9, cuda_device)
    assert_matches([x, w1, b1, w2, b2] if biased else [x, w1, None, w2, None], activation, p)


def test_packed_weights_are_both(cuda_device):
    x, gate, up, down = inputs_of(9, 20, 40, 9, cuda_device, gated=True)
    packed = torch.cat((gate, up)).detach().requires_grad_()
    assert_matches([x, packed, None, down], gated=True)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
def test_weights_of_another_dtype(cuda_device, dtype, gated):
    inputs = inputs_of(9, 20, 40, 9, cuda_device, dtype, SINGLE, gated)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    cotangent = torch.randn(9, 9, device=cuda_device)
    truth, same, actual = (
        run(network(gated=gated, impl=impl), given, cotangent)
        for impl, given in (("reference", wide), ("reference", inputs), ("native", inputs))
    )
    assert [result.dtype for result in actual] == [dtype, *(tensor.dtype for tensor in inputs)]
    # The weights' gradients are products in the dtype of x, kept in fp32.
    narrow = [[result.to(dtype) for result in results] for results in (actual, same)]
    oracle.assert_all_match(narrow[0], truth, narrow[1], ("output", *NAMES[gated]))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [41, 264])
def test_kernels_draw_the_references_mask(operators, cuda_device, columns, dtype, activation):
    rows, p = 19, 0.4
    pre = torch.full((rows, columns), 2.0, dtype=dtype, device=cuda_device)
    kept = oracle.kept_elements(SEED, p, rows, columns, site=SITE).to(cuda_device)
    settings = settings_of(cuda_device, activation, p)
    hidden = operators.activation_dropout(pre, *settings)
    assert torch.equal(hidden != 0, kept)
    dy, identity = torch.ones_like(pre), torch.eye(columns, dtype=dtype, device=cuda_device)
    saved = hidden if activation == "relu" else pre
    dpre, _, _ = operators.linear_activation_backward(dy, identity, saved, *settings, False, None)
    assert torch.equal(dpre != 0, kept)
    if activation == "relu":
        assert torch.equal(dpre, (kept * keep_scale(p)).to(dtype))


VIEWS = {
    "row stride": lambda x: F.pad(x, (0, 6))[..., :20],
    "column stride": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_strides(cuda_device, view, gated):
    inputs = inputs_of((3, 4), 20, 40, 20, cuda_device, gated=gated)
    cotangent = VIEWS[view](torch.randn(3, 4, 20, device=cuda_device))
    x, *parameters = (tensor.detach() for tensor in inputs)
    viewed = [VIEWS[view](x), *(F.pad(parameter, (0, 3))[..., :-3] for parameter in parameters)]
    viewed[1] = viewed[1].t().contiguous().t()
    assert_matches([tensor.requires_grad_() for tensor in viewed], gated=gated, cotangent=cotangent)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_rows(cuda_device, gated):
    inputs = inputs_of((2, 0), 20, 35, 9, cuda_device, gated=gated)
    output, dx, *gradients = run(network(gated=gated, impl="native"), inputs, torch.zeros(2, 0, 9, device=cuda_device))
    assert output.shape == (2, 0, 9)
    assert dx.shape == (2, 0, 20)
    for gradient, tensor in zip(gradients, inputs[1:], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_same_inputs_same_bits(cuda_device):
    inputs, cotangent = inputs_of(300, 20, 72, 9, cuda_device), torch.randn(300, 9, device=cuda_device)
    first, second = (run(network(impl="native"), inputs, cotangent) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_vectors_and_elements_give_the_same_bits(operators, cuda_device, gated):
    pre = torch.randn(9, 80 if gated else 40, device=cuda_device)
    apart = F.pad(pre, (0, 3))[:, :-3]
    settings = settings_of(cuda_device, "gelu", 0.3, gated)
    dy, weight = torch.randn(9, 7, device=cuda_device), torch.randn(7, 40, device=cuda_device)
    results = []
    for saved in (pre, apart):
        hidden = operators.activation_dropout(saved, *settings)
        backward = operators.linear_activation_backward(dy, weight, saved, *settings, True, SINGLE)
        results.append([hidden, *backward])
        assert torch.equal(hidden, backward[1])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("save", [True, False])
def test_backward_sees_the_pre_activation_as_stored(operators, cuda_device, save):
    x, w1, b1, *_ = (tensor.detach() for tensor in inputs_of(9, 20, 40, 9, cuda_device, HALF))
    settings, expected = settings_of(cuda_device), F.linear(x, w1, b1)
    hidden, pre = operators.linear_activation(x, w1, None, b1, *settings, save)
    assert torch.equal(hidden, operators.activation_dropout(expected, *settings))
    assert torch.equal(pre, expected if save else expected.new_empty(0))


def test_says_what_it_does_not_know(operators, cuda_device):
    with pytest.raises(RuntimeError, match=r"activation: expected one of tfm\.ops\.feed_forward, got swish"):
        operators.activation_dropout(torch.ones(2, 3, device=cuda_device), *settings_of(cuda_device, "swish"))


def test_operators_obey_torch(operators, cuda_device):
    x, w1, b1, w2, _ = (tensor.detach() for tensor in inputs_of(9, 20, 40, 9, cuda_device))
    settings = settings_of(cuda_device)
    arguments = x, w1, None, b1, *settings, True
    torch.library.opcheck(operators.linear_activation.default, arguments)
    _, pre = operators.linear_activation(*arguments)
    torch.library.opcheck(operators.activation_dropout.default, (pre, *settings))
    backward = torch.randn(9, 9, device=cuda_device), w2, pre, *settings, True, SINGLE
    torch.library.opcheck(operators.linear_activation_backward.default, backward)
