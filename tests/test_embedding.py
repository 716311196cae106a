"""Token embedding against torch's, and the sinusoid against the paper's definition."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops

VOCABULARY, DIM = 11, 6


def paper(positions, dim: int) -> torch.Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/dim)), PE(pos, 2i + 1) = cos(the same), one element at a time."""
    rows = [
        [(math.cos if j % 2 else math.sin)(position / 10000 ** ((j - j % 2) / dim)) for j in range(dim)]
        for position in positions
    ]
    return torch.tensor(rows, dtype=torch.float64).view(len(positions), dim)


@pytest.mark.parametrize("dim", [1, 2, 5, 6, 64])
def test_sinusoid_is_the_papers(dim):
    positions = [0, 1, 2, 17, 511, 5000]
    exact = ops.sinusoid(torch.tensor(positions), dim, torch.float64)
    torch.testing.assert_close(exact, paper(positions, dim), rtol=1e-11, atol=1e-11)
    # In fp32 an angle of p radians is off by p roundings.
    single = ops.sinusoid(torch.tensor(positions), dim)
    assert single.dtype == torch.float32
    for row, truth, position in zip(single, exact, positions, strict=True):
        assert (row - truth).abs().max() <= (position + 1) * torch.finfo(torch.float32).eps


def test_sinusoid_takes_any_shape_of_positions():
    positions = torch.tensor([[0, 3], [5, 1]], dtype=torch.int32)
    assert torch.equal(ops.sinusoid(positions, 4), ops.sinusoid(positions.flatten(), 4).view(2, 2, 4))


def arguments(dtype=torch.float64):
    tokens = torch.randint(VOCABULARY, (3, 5))
    weight = torch.randn(VOCABULARY, DIM, dtype=torch.float64).to(dtype).requires_grad_()
    position_weight = torch.randn(9, DIM, dtype=torch.float64).to(dtype).requires_grad_()
    return tokens, weight, torch.arange(5) + 2, position_weight


@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("learned", [False, True], ids=["sinusoid", "learned"])
def test_equals_torch(learned, padding_idx, integers):
    tokens, weight, positions, position_weight = arguments()
    tokens[0, :2], tokens[1, 3] = 0, VOCABULARY - 1
    options = {"position_weight": position_weight if learned else None, "scale": 2.5, "padding_idx": padding_idx}
    output = ops.embedding(tokens.to(integers), weight, positions.to(integers), **options)
    rows = F.embedding(positions, position_weight) if learned else paper(positions.tolist(), DIM)
    expected = F.embedding(tokens, weight, padding_idx) * 2.5 + rows
    torch.testing.assert_close(output, expected)
    wanted = [weight, position_weight] if learned else [weight]
    cotangent = torch.randn_like(output)
    grads, expected_grads = (torch.autograd.grad(y, wanted, cotangent) for y in (output, expected))
    torch.testing.assert_close(grads, expected_grads)
    if padding_idx is not None:
        assert (grads[0][padding_idx] == 0).all()
        assert (grads[0] != 0).any()


def test_each_token_may_have_its_own_position():
    tokens, weight, _, _ = arguments()
    positions = torch.randint(50, tokens.shape)
    output = ops.embedding(tokens, weight, positions)
    torch.testing.assert_close(
        output.flatten(0, 1), weight[tokens.flatten()] + paper(positions.flatten().tolist(), DIM)
    )


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_falls_on_the_sum(p):
    tokens, weight, positions, position_weight = arguments()
    options = {"position_weight": position_weight, "scale": 3.0}
    output = ops.embedding(tokens, weight, positions, dropout_p=p, seed=-6, site=1, **options)
    torch.testing.assert_close(
        output, ops.dropout(ops.embedding(tokens, weight, positions, **options), p, seed=-6, site=1)
    )


def test_gradcheck():
    tokens, weight, positions, position_weight = arguments()

    def function(weight, position_weight):
        return ops.embedding(tokens, weight, positions, position_weight=position_weight, dropout_p=0.4, seed=3)

    assert torch.autograd.gradcheck(function, (weight, position_weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["sinusoid", "learned"])
def test_errs_no_more_than_torch(dtype, learned):
    tokens, weight, positions, position_weight = arguments(dtype)
    results = []
    for some, function in ((weight, ops.embedding), (weight.detach().double(), ops.embedding), (weight, None)):
        some = some.detach().requires_grad_()
        rows = position_weight.detach().to(some.dtype) if learned else None
        if function:
            output = function(tokens, some, positions, position_weight=rows, scale=8.0)
        else:
            rows = rows if learned else ops.sinusoid(positions, DIM).to(dtype)
            output = F.embedding(tokens, some) * 8.0 + (rows[positions] if learned else rows)
        results.append([output, torch.autograd.grad(output.sum(), some)[0]])
    assert results[0][0].dtype == dtype
    oracle.assert_all_match(*results, ("output", "weight"))


@settings(deadline=None, max_examples=20)
@given(shape=st.lists(st.integers(0, 3), max_size=3), dim=st.integers(1, 5))
def test_any_shape(shape, dim):
    tokens, weight = torch.randint(4, shape), torch.randn(4, dim, dtype=torch.float64)
    output = ops.embedding(tokens, weight, torch.tensor(3))
    torch.testing.assert_close(output, weight[tokens] + paper([3], dim)[0])


def test_a_token_outside_the_vocabulary():
    with pytest.raises(IndexError, match="out of range"):
        ops.embedding(torch.tensor([VOCABULARY]), torch.zeros(VOCABULARY, DIM), torch.tensor([0]))
