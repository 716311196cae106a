"""The gradient of an additive bias: held against the oracle along every dimension it broadcasts, and split or not."""

from __future__ import annotations

import launches
import pytest
import torch
from attention_cases import SEED, Problem, assert_matches, make, results
from oracle import HALVES

from tfm import ops
from tfm.kernels.launch.attention import scores as launch

ALONE, SPLIT = ["bias_gradient_kernel"], ["bias_gradient_kernel", "sum_splits_kernel"]

# B, Hq, Hkv, Sq, Sk, D, Dv; shapes of the bias; what else rules.
PROBLEMS = {
    "of its own": Problem((2, 2, 1, 17, 33, 16, 16), {"dropout_p": 0.3}, ("float", (2, 2, 17, 33))),
    "for all sequences": Problem((3, 2, 1, 17, 33, 16, 24), {"dropout_p": 0.3}, ("float", (1, 2, 17, 33))),
    "for all heads": Problem((2, 4, 2, 17, 33, 16, 16), {"key_lengths": [33, 0]}, ("float", (2, 1, 17, 33))),
    "for all queries": Problem((2, 2, 2, 70, 17, 16, 16), {"dropout_p": 0.2}, ("float", (2, 2, 1, 17))),
    "for all keys": Problem((2, 2, 2, 17, 20, 16, 16), {}, ("float", (2, 2, 17, 1))),
    "for everything": Problem((2, 2, 1, 35, 33, 16, 16), {"softcap": 1.5}, ("float", (33,))),
    "several tiles": Problem((1, 2, 2, 70, 65, 16, 16), {"is_causal": True, "query_start": 2}, ("float", (70, 65))),
    "rows without keys": Problem(
        (2, 2, 1, 17, 33, 16, 16), {"window_size": (3, 1), "query_start": [30, -5], "sinks": True},
        ("float", (1, 2, 17, 33)),
    ),
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_kernel_matches(problem, kernel_device, launched):
    found = assert_matches(make(problem, kernel_device, torch.float32), torch.float32)
    assert found["dbias"].shape == torch.Size(problem.mask[1])
    assert launched[-2:] == SPLIT or launched[-1:] == ALONE


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", ["for all sequences", "for everything"])
def test_kernel_matches_in_half_precision(name, half, kernel_device):
    assert_matches(make(PROBLEMS[name], kernel_device, half), half)


def test_split_or_not_it_is_the_same_sum(kernel_device, monkeypatch, launched):
    tensors = make(PROBLEMS["for all sequences"], kernel_device, torch.float32)
    found = []
    for splits in (1, 2, 3, 5):
        monkeypatch.setattr(launch, "bias_splits", lambda places, members, splits=splits: splits)
        launched.clear()
        found.append(results(tensors, "triton", torch.float32)["dbias"])
        assert launched[-1] == (ALONE if splits == 1 else SPLIT)[-1]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    # As many splits as sequences: the order of the sums is the loop's own.
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[3], found[0], rtol=0, atol=0)


def test_splits_fill_a_gpu_and_stay_bounded():
    assert launch.bias_splits(1, 2048) == launch.BIAS_PROGRAMS
    assert launch.bias_splits(8, 3) == 3
    assert launch.bias_splits(launch.BIAS_PROGRAMS, 256) == 1
    assert launch.bias_splits(0, 0) == 1


def test_same_inputs_same_bits(kernel_device):
    tensors = make(PROBLEMS["for everything"], kernel_device, torch.float32)
    first, second = (results(tensors, "triton", torch.float32)["dbias"] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_of_the_size_of_all_scores_is_allocated(kernel_device, monkeypatch):
    monkeypatch.setattr(launch, "bias_splits", lambda places, members: 3)
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: sizes.append(empty(*size, **kw)) or sizes[-1])
    query, key, value = (torch.randn(12, 1, 17, 16, device=kernel_device) for _ in range(3))
    bias = torch.randn(17, 17, device=kernel_device, requires_grad=True)
    ops.attention(query, key, value, bias, dropout_p=0.1, seed=SEED, impl="triton").sum().backward()
    assert 0 < max(tensor.numel() for tensor in sizes) < 12 * 17 * 17


def test_strides_of_the_bias_change_nothing(kernel_device):
    query, key, value = (torch.randn(2, 2, 17, 16, device=kernel_device) for _ in range(3))
    bias = torch.randn(1, 2, 17, 17, device=kernel_device)
    gradients = []
    for given in (
        bias,
        bias.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        bias.repeat_interleave(2, 3)[..., ::2],
    ):
        learnt = given.detach().requires_grad_()
        ops.attention(query, key, value, learnt, impl="triton").square().sum().backward()
        gradients.append(learnt.grad)
    for other in gradients[1:]:
        assert torch.equal(other, gradients[0])
