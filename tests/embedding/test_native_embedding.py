"""The native token embedding, with scale, positions and dropout, against the oracle."""

from __future__ import annotations

import math

import native
import oracle
import pytest
import torch
import torch.nn.functional as F
from embedding_cases import SEED, SITE, TOKENS, assert_kernel_matches, paper, run
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops
from tfm.reference.dropout import keep_scale

pytestmark = native.MARKS
DTYPES = [torch.float32, torch.bfloat16]


def assert_matches(tokens, dim, vocabulary=11, dtype=torch.float32, learned=False, **options):
    assert_kernel_matches(tokens, dim, vocabulary, dtype, learned, "native", **options)


# Vectors that the columns do not fill, more columns than one draw of dropout covers.
@pytest.mark.parametrize("dim", [1, 17, 300])
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["sinusoid", "learned"])
def test_native_matches(learned, dtype, tokens, instruction_set, dim):
    with native.instruction_set(instruction_set):
        assert_matches(TOKENS[tokens](), dim, 11, dtype, learned, padding_idx=-2)


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.lists(st.integers(0, 6), max_size=150),
    dim=st.sampled_from([1, 2, 16, 130]),
    padding_idx=st.sampled_from([None, 0, 6]),
    p=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_native_matches_whatever_the_tokens(tokens, dim, padding_idx, p):
    tokens = torch.tensor(tokens, dtype=torch.int32)
    assert_matches(tokens, dim, 7, learned=True, padding_idx=padding_idx, p=p)


def test_a_wide_vocabulary_few_of_whose_tokens_occur():
    tokens = torch.tensor([4999, 0, 300, 300, 4999])
    assert_matches(tokens, 5, 5000)
    assert_matches(tokens[:0], 5, 70)


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dim", [1, 5, 64, 1030])
@pytest.mark.parametrize("positions", [[0, 1, 2, 17, 511, 5000, 1_000_000], [*range(40, -1, -1)]], ids=["far", "near"])
def test_native_computes_the_papers_sinusoid(positions, dim, instruction_set):
    with native.instruction_set(instruction_set):
        found = ops.embedding(torch.zeros(len(positions), dtype=torch.int64), torch.zeros(1, dim),
                              torch.tensor(positions), impl="native")  # fmt: skip
    for row, truth, position in zip(found.double(), paper(positions, dim), positions, strict=True):
        # The frequency is rounded to a 2^-33rd of a turn.
        assert (row - truth).abs().max() <= 2 * torch.finfo(torch.float32).eps + position * 2**-33 * 2 * math.pi


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
def test_native_draws_the_references_mask(instruction_set):
    rows, columns, p = 19, 141, 0.4
    weight = torch.ones(rows, columns, requires_grad=True)
    tokens, nothing = torch.arange(rows).flip(0), torch.zeros(1, columns)
    with native.instruction_set(instruction_set):
        y = ops.embedding(tokens, weight, torch.tensor(0), position_weight=nothing, dropout_p=p, seed=SEED, site=SITE,
                          impl="native")  # fmt: skip
        y.backward(torch.ones_like(y))
    expected = oracle.kept_elements(SEED, p, rows, columns, site=SITE) * keep_scale(p)
    assert torch.equal(y, expected)
    assert torch.equal(weight.grad, expected.flip(0))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (1, 5), (3, 5)], ids=str)
def test_positions_broadcast(shape):
    tokens, positions = torch.randint(11, (3, 5)), torch.randint(11, shape, dtype=torch.int32)
    weight, position_weight = torch.randn(2, 11, 6)
    found, expected = (
        ops.embedding(tokens, weight, positions, position_weight=position_weight, impl=impl)
        for impl in ("native", "reference")
    )
    assert torch.equal(found, expected)


def test_strides_change_nothing():
    tokens, weight, cotangent = torch.randint(11, (5, 3)), torch.randn(11, 6), torch.randn(3, 5, 6)
    positions = torch.arange(3)
    expected = run("native", tokens, weight.requires_grad_(), positions, None, cotangent.transpose(0, 1).contiguous())
    views = [tokens.t().contiguous().t(), F.pad(weight.detach(), (0, 3))[:, :6].requires_grad_()]
    actual = run("native", *views, positions.repeat_interleave(2)[::2], None, cotangent.transpose(0, 1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    gradient = torch.randn(6)
    expected = run("native", tokens, weight, positions, None, gradient.expand(5, 3, 6).contiguous())
    actual = run("native", tokens, weight, positions, None, gradient.expand(5, 3, 6))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("table", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_positions_may_have_a_dtype_of_their_own(table):
    tokens, weight, position_weight = torch.randint(11, (20,)), torch.randn(11, 17), torch.randn(20, 17).to(table)
    tables = [weight.requires_grad_(), position_weight.requires_grad_()]
    cotangent, positions = torch.randn(20, 17), torch.arange(20)
    actual = run("native", tokens, tables[0], positions, tables[1], cotangent)
    expected = run("reference", tokens, tables[0], positions, tables[1], cotangent)
    assert actual[2].dtype == table
    torch.testing.assert_close(actual[:2], expected[:2])
    torch.testing.assert_close(actual[2], expected[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_same_bits_on_any_number_of_threads(sparse, dtype):
    tokens = (torch.rand(2000) ** 8 * 3000).long()  # a few of them again and again
    weight, cotangent = torch.randn(3000, 40, dtype=dtype, requires_grad=True), torch.randn(2000, 40)

    def compute():
        results = run("native", tokens, weight, tokens, None, cotangent, sparse=sparse)
        return [results[0], results[1]._values(), results[1]._indices()] if sparse else results

    native.assert_same_bits(compute)


def test_a_token_outside_its_table_is_an_index_error():
    tokens, weight = torch.tensor([3, 11]), torch.randn(11, 6)
    with pytest.raises(IndexError, match=r"^tokens: expected rows 0 to 10, got 11, out of range"):
        ops.embedding(tokens, weight, torch.tensor(0), impl="native")
    with pytest.raises(IndexError, match=r"^positions: expected rows 0 to 4, got -1, out of range"):
        ops.embedding(tokens * 0, weight, torch.tensor([0, -1]), position_weight=weight[:5], impl="native")


def test_sparse_gradient_is_the_dense_one():
    tokens, weight = torch.randint(11, (2, 50)), torch.randn(11, 6, requires_grad=True)
    arguments = ("native", tokens, weight, torch.arange(50), None, torch.randn(2, 50, 6))
    (_, dense), (_, sparse) = (run(*arguments, padding_idx=4, sparse=chosen) for chosen in (False, True))
    assert sparse.is_sparse
    assert (sparse._values().abs().sum(1) > 0).sum() <= 10  # no token has two rows, padding none
    assert torch.equal(sparse.to_dense(), dense)


def test_sparse_gradient_joins_the_generators_dense_one():
    tokens, weight, found = torch.randint(11, (20,)), torch.randn(11, 6, requires_grad=True), []
    for sparse in (False, True):
        hidden = ops.embedding(tokens, weight, torch.tensor(0), sparse=sparse, impl="native")
        found += torch.autograd.grad((hidden @ weight.t()).square().sum(), weight)
    assert not found[1].is_sparse
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("wanted", ["weight", "positions"])
def test_only_wanted_gradients_are_computed(wanted):
    tokens, tables = torch.randint(11, (20,)), dict(zip(("weight", "positions"), torch.randn(2, 11, 6), strict=True))
    tables[wanted].requires_grad_()
    y = ops.embedding(tokens, tables["weight"], tokens, position_weight=tables["positions"], impl="native")
    y.sum().backward()
    expected = tokens.bincount(minlength=11)[:, None].float().expand(11, 6)
    assert torch.equal(tables.pop(wanted).grad, expected)
    assert all(table.grad is None for table in tables.values())


def test_operators_obey_torch():
    tokens, positions, seed = torch.randint(11, (3, 5)), torch.arange(5), torch.tensor(SEED)
    weight, table = torch.randn(2, 11, 6)
    operator = torch.ops.tfm_native.embedding.default
    torch.library.opcheck(operator, (tokens, weight, positions, table, seed, 2.0, 0.3, SITE))
    torch.library.opcheck(operator, (tokens, weight.bfloat16(), positions, None, None, 1.0, 0.0, 0))
    backward = torch.ops.tfm_native.embedding_backward.default
    dy = torch.randn(3, 5, 6)
    torch.library.opcheck(backward, (dy, tokens, seed, 2.0, 0.3, SITE, 11, 0, torch.bfloat16, False))
    torch.library.opcheck(backward, (dy, tokens, None, 2.0, 0.0, 0, 11, None, torch.float32, True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    tokens, positions = torch.randint(11, (2, 20))
    weight, table = (t.requires_grad_() for t in torch.randn(2, 11, 6).unbind())

    def function(weight, table):
        options = {"position_weight": table, "dropout_p": 0.3, "seed": SEED, "impl": "native"}
        return ops.embedding(tokens, weight, positions, **options)

    torch._dynamo.reset()
    results = []
    for wrapped in (function, torch.compile(function, backend=backend, fullgraph=True)):
        y = wrapped(weight, table)
        results.append([y.detach(), *torch.autograd.grad(y, (weight, table), torch.ones_like(y))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_native_is_what_cpus_take():
    tokens, weight = torch.randint(11, (20,)), torch.randn(11, 6)
    assert torch.equal(ops.embedding(tokens, weight, tokens), ops.embedding(tokens, weight, tokens, impl="native"))
    with pytest.raises(ValueError, match=r"native.*expected one of float32, bfloat16, got float16"):
        ops.embedding(tokens, weight.half(), tokens, impl="native")
