"""Heads that are views of one projection: their gradients lie in one tensor again, as the views do, without a copy."""

from __future__ import annotations

import native
import pytest
import torch
from torch import Tensor

from tfm import ops
from tfm.kernels.launch.attention import short
from tfm.operators.attention import split_heads

NATIVE = pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)


def equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("impl", "kernels"),
    [
        pytest.param(
            "native", "", marks=pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
        ),
        pytest.param("triton", "short", marks=pytest.mark.triton),
        pytest.param("triton", "of any length", marks=pytest.mark.triton),
    ],
)
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("layout", ["packed", "batch first", "sequence first"])
def test_gradients_of_one_projection_are_one_tensor(layout, parts, impl, kernels, kernel_device, monkeypatch):
    device = kernel_device if impl == "triton" else torch.device("cpu")
    if kernels == "of any length":
        for name in ("short_attention_forward", "short_attention_backward"):
            monkeypatch.setattr(short, name, lambda **_: None)
    queries = torch.randn(3, 9, 8, device=device, requires_grad=True)
    projected = torch.randn(3, 9, parts * 8, device=device, requires_grad=True)

    def attended(split):
        heads = (*split(queries, 1, 2), *split(projected, parts, 2))[-3:]
        if layout == "packed":
            cu_seq = torch.tensor([0, 20, 27], dtype=torch.int32, device=device)
            heads = [x.flatten(0, 1) for x in heads]
            output = ops.varlen_attention(*heads, cu_seq, cu_seq, 20, 20, impl=impl)
        else:
            order = (0, 2, 1, 3) if layout == "batch first" else (1, 2, 0, 3)
            output = ops.attention(*(x.permute(order) for x in heads), is_causal=True, impl=impl).permute(order)
        return torch.autograd.grad(output.square().sum(), (queries, projected), allow_unused=True)

    expected = attended(lambda x, parts, heads: x.unflatten(-1, (parts, heads, -1)).unbind(-3))
    stacked = []
    monkeypatch.setattr(torch, "stack", lambda views, dim: stacked.append(len(views)) or torch.cat(views, dim - 1))
    for _ in range(3):
        equal(attended(split_heads), expected)
    assert parts not in stacked


def test_gradients_that_lie_apart_are_stacked():
    projected = torch.randn(5, 24, requires_grad=True)
    query, key, value = split_heads(projected, 3, 2)
    (query.square() + key * value).sum().backward()
    equal(projected.grad, torch.cat([2 * query, value, key], 2).view(5, 2, 3, 4).transpose(1, 2).reshape(5, 24))
    equal(
        torch.autograd.grad(split_heads(projected, 3, 2)[1].sum(), projected)[0][:, ::8],
        torch.tensor([[0.0, 1, 0]] * 5),
    )
