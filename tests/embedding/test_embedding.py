"""Token embedding against torch's, the kernel against the oracle, the sinusoid against the paper's definition."""

from __future__ import annotations

import math

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from embedding_cases import SEED, SITE, TOKENS, assert_kernel_matches, paper, run
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES
from torch.utils.checkpoint import checkpoint

from tfm import ops

VOCABULARY, DIM = 11, 6


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


FORWARD = ["embedding_forward_kernel"]


def backward(count):
    """The launches of a table's gradient: 32 tokens make a chunk, and without one there is nothing to add up ahead."""
    return ["embedding_chunks_kernel"] * (count >= 32) + ["embedding_backward_kernel"]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["sinusoid", "learned"])
def test_kernel_matches(tokens, dtype, learned, kernel_device, launched):
    given = TOKENS[tokens]().to(kernel_device)
    assert_kernel_matches(given, 17, 11, dtype, learned, padding_idx=-2)
    assert launched == FORWARD + backward(given.numel()) * (2 if learned else 1)


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.lists(st.integers(0, 6), max_size=150),
    dim=st.sampled_from([1, 2, 16, 130]),
    dtype=st.sampled_from(DTYPES),
    padding_idx=st.sampled_from([None, 0, 6]),
    p=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_kernel_matches_whatever_the_tokens(tokens, dim, dtype, padding_idx, p):
    tokens = torch.tensor(tokens, dtype=torch.int32, device=DEVICE)
    assert_kernel_matches(tokens, dim, 7, dtype, learned=True, padding_idx=padding_idx, p=p)


@pytest.mark.parametrize("dim", [1, 5, 64, 1030])
def test_kernel_computes_the_papers_sinusoid(dim, kernel_device):
    positions = [0, 1, 2, 17, 511, 5000, 1_000_000]
    weight = torch.zeros(1, dim, device=kernel_device)
    tokens = torch.zeros(len(positions), dtype=torch.int64, device=kernel_device)
    found = ops.embedding(tokens, weight, torch.tensor(positions, device=kernel_device), impl="triton")
    for row, truth, position in zip(found.cpu().double(), paper(positions, dim), positions, strict=True):
        # The frequency is rounded to a 2^-33rd of a turn.
        assert (row - truth).abs().max() <= 2 * torch.finfo(torch.float32).eps + position * 2**-33 * 2 * math.pi


def test_kernel_on_a_wide_vocabulary_few_of_whose_tokens_occur(kernel_device, launched):
    tokens = torch.tensor([4999, 0, 300, 300, 4999], device=kernel_device)
    assert_kernel_matches(tokens, 5, 5000)
    assert_kernel_matches(tokens[:0], 5, 70)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (3, 5)], ids=str)
def test_kernel_takes_positions_that_broadcast(shape, kernel_device, launched):
    tokens = torch.randint(11, (3, 5), device=kernel_device)
    weight, position_weight = torch.randn(2, 11, 6, device=kernel_device)
    positions = torch.randint(11, shape, device=kernel_device)
    found, expected = (
        ops.embedding(tokens, weight, positions, position_weight=position_weight, impl=impl)
        for impl in ("triton", "reference")
    )
    assert torch.equal(found, expected)
    assert launched == FORWARD


def test_kernel_takes_strides(kernel_device):
    tokens = torch.randint(11, (5, 3), device=kernel_device)
    weight = torch.randn(11, 6, device=kernel_device)
    positions, cotangent = torch.arange(3, device=kernel_device), torch.randn(3, 5, 6, device=kernel_device)
    expected = run("triton", tokens, weight.requires_grad_(), positions, None, cotangent.transpose(0, 1).contiguous())
    views = [tokens.t().contiguous().t(), F.pad(weight.detach(), (0, 3))[:, :6].requires_grad_()]
    actual = run("triton", *views, positions.repeat_interleave(2)[::2], None, cotangent.transpose(0, 1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_same_tokens_same_bits(kernel_device):
    tokens = torch.randint(5, (300,), device=kernel_device)
    weight = torch.randn(5, 6, device=kernel_device, requires_grad=True)
    cotangent = torch.randn(300, 6, device=kernel_device)
    place = torch.tensor(0, device=kernel_device)
    first, second = (run("triton", tokens, weight, place, None, cotangent) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_kernel_reads_nothing_outside_its_tables(kernel_device, launched):
    tokens = torch.tensor([3, -1, 11, 3], device=kernel_device)
    weight = torch.randn(11, 6, device=kernel_device, requires_grad=True)
    y = ops.embedding(tokens, weight, torch.tensor(0, device=kernel_device), impl="triton")
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    (gradient,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    expected = torch.zeros_like(weight)
    expected[3] = 2
    assert torch.equal(gradient, expected)
    places = torch.tensor([5, 0, 1, -1], device=kernel_device)
    y = ops.embedding(tokens * 0, weight, places, position_weight=weight[:5].detach(), impl="triton")
    assert y.isnan().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_sparse_gradient_is_the_dense_one(impl, kernel_device, launched):
    tokens = torch.randint(11, (2, 50), device=kernel_device)
    weight = torch.randn(11, 6, device=kernel_device, requires_grad=True)
    positions, cotangent = torch.arange(50, device=kernel_device), torch.randn(2, 50, 6, device=kernel_device)
    arguments = (impl, tokens, weight, positions, None, cotangent)
    (_, dense), (_, sparse) = (run(*arguments, padding_idx=4, sparse=chosen) for chosen in (False, True))
    assert sparse.is_sparse
    assert sparse.shape == weight.shape
    torch.testing.assert_close(sparse.to_dense(), dense)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_sparse_gradient_joins_the_generators_dense_one(impl, kernel_device):
    tokens = torch.randint(11, (20,), device=kernel_device)
    weight = torch.randn(11, 6, device=kernel_device, requires_grad=True)
    found = []
    for sparse in (False, True):
        hidden = ops.embedding(tokens, weight, torch.tensor(0, device=kernel_device), sparse=sparse, impl=impl)
        found += torch.autograd.grad((hidden @ weight.t()).square().sum(), weight)
    assert not found[1].is_sparse
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wanted", ["weight", "positions"])
def test_only_wanted_gradients_are_computed(wanted, kernel_device, launched):
    tokens = torch.randint(11, (20,), device=kernel_device)
    weight, table = torch.randn(2, 11, 6, device=kernel_device)
    needed = (weight if wanted == "weight" else table).requires_grad_()
    ops.embedding(tokens, weight, tokens, position_weight=table, impl="triton").sum().backward()
    assert needed.grad is not None
    assert launched == FORWARD + backward(20)


def test_operators_obey_torch(kernel_device):
    tokens = torch.randint(11, (3, 5), device=kernel_device)
    weight, table = torch.randn(2, 11, 6, device=kernel_device)
    positions, seed = torch.arange(5, device=kernel_device), torch.tensor(SEED, device=kernel_device)
    operator = torch.ops.tfm.embedding.default
    torch.library.opcheck(operator, (tokens, weight, positions, table, seed, 2.0, 0.3, SITE))
    torch.library.opcheck(operator, (tokens, weight.half(), positions, None, None, 1.0, 0.0, 0))
    backward = torch.ops.tfm.embedding_backward.default
    dy = torch.randn(3, 5, 6, device=kernel_device)
    torch.library.opcheck(backward, (dy, tokens, seed, 2.0, 0.3, SITE, 11, 0, torch.float16, False))
    torch.library.opcheck(backward, (dy, tokens, None, 2.0, 0.0, 0, 11, None, torch.float32, True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend, kernel_device, launched):
    tokens, positions = torch.randint(11, (2, 20), device=kernel_device)
    weight, table = (t.requires_grad_() for t in torch.randn(2, 11, 6, device=kernel_device).unbind())

    def function(weight, table):
        options = {"position_weight": table, "dropout_p": 0.3, "seed": SEED, "impl": "triton"}
        return ops.embedding(tokens, weight, positions, **options)

    torch._dynamo.reset()
    results = []
    for wrapped in (function, torch.compile(function, backend=backend, fullgraph=True)):
        y = wrapped(weight, table)
        results.append([y.detach(), *torch.autograd.grad(y, (weight, table), torch.ones_like(y))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_checkpoint_draws_the_same_mask(kernel_device):
    tokens = torch.randint(11, (20,), device=kernel_device)
    weight = torch.randn(11, 6, device=kernel_device, requires_grad=True)
    function = lambda weight: ops.embedding(tokens, weight, tokens, dropout_p=0.5, impl="triton")  # noqa: E731
    results = []
    for wrapped in (function, lambda weight: checkpoint(function, weight, use_reentrant=False)):
        torch.manual_seed(1)
        y = wrapped(weight)
        results.append([y.detach(), *torch.autograd.grad(y, weight, torch.ones_like(y))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_explicit_triton_says_why_not(kernel_device):
    tokens = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    with pytest.raises(ValueError, match=r"^embedding cannot run with impl='triton': .*got float64$"):
        ops.embedding(tokens, torch.zeros(3, 4, device=kernel_device).double(), tokens, impl="triton")
