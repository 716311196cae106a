"""The softmax weights that attention returns on request: held against the oracle, dropout included."""

from __future__ import annotations

import launches
import oracle
import pytest
import torch
from attention_cases import Problem, attend, make
from oracle import DTYPES

from tfm import ops

PROBLEMS = {
    "dropout": Problem((2, 2, 1, 17, 33, 16, 16), {"dropout_p": 0.3}),
    "several tiles, causal": Problem((1, 2, 2, 70, 65, 16, 16), {"is_causal": True, "query_start": -2}),
    "lengths, window, softcap": Problem(
        (2, 4, 2, 17, 20, 24, 16), {"key_lengths": [20, 0], "window_size": (5, 2), "softcap": 1.5}
    ),
    "starts, sinks": Problem((2, 2, 2, 17, 33, 16, 16), {"is_causal": True, "query_start": [16, -3], "sinks": True}),
    "bool mask": Problem((2, 2, 2, 17, 33, 16, 16), {"dropout_p": 0.1}, ("bool", (2, 1, 17, 33))),
    "key padding": Problem((2, 2, 2, 17, 33, 16, 16), {}, ("bool", (2, 1, 1, 33))),
    "bias": Problem((2, 2, 1, 17, 33, 80, 16), {"dropout_p": 0.1}, ("float", (1, 2, 17, 33))),
}


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_kernel_matches(problem, dtype, kernel_device, launched):
    tensors = make(problem, kernel_device, dtype)
    tensors.rules["return_weights"] = True

    def weights(impl, kind):
        return attend(tensors, {n: None if x is None else x.to(kind) for n, x in tensors.inputs.items()}, impl)[2]

    actual = weights("triton", dtype)
    assert launched[-1] == "attention_weights_kernel"
    assert launched.count("attention_weights_kernel") == 1
    assert actual.dtype == dtype
    assert not actual.requires_grad
    oracle.assert_matches(actual, weights("reference", torch.float64), weights("reference", dtype), "weights")


def test_weights_times_values_are_the_output(kernel_device):
    query, key, value = (torch.randn(2, 2, 17, 16, device=kernel_device, requires_grad=True) for _ in range(3))
    options = {"dropout_p": 0.4, "seed": 5, "is_causal": True, "impl": "triton"}
    output, weights = ops.attention(query, key, value, return_weights=True, **options)
    torch.testing.assert_close(weights @ value, output)
    # The output keeps its gradient beside them.
    gradients = [torch.autograd.grad(y.sum(), query)[0] for y in (output, ops.attention(query, key, value, **options))]
    assert torch.equal(*gradients)


def test_masked_keys_weigh_nothing_whatever_they_hold(kernel_device):
    query, key, value = (torch.randn(2, 2, 17, 16, device=kernel_device) for _ in range(3))
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool, device=kernel_device)
    mask[:, ..., 9:] = False
    mask[1] = False
    expected = ops.attention(query, key, value, mask, return_weights=True, impl="triton")[1]
    poisoned = key.masked_fill(~mask.transpose(2, 3), float("nan"))
    actual = ops.attention(query, poisoned, value, mask, return_weights=True, impl="triton")[1]
    assert torch.equal(actual, expected)
    assert not actual[:, ..., 9:].any()
    assert not actual[1].any()
