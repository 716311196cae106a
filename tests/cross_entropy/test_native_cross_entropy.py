"""The native loss of a linear layer against the oracle, and its promises: bits, memory, ignored rows, torch's tools."""

from __future__ import annotations

from itertools import product

import allocations
import native
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    EVERYTHING,
    OPTIONS,
    assert_all_ignored_is_no_loss,
    assert_compiles_whole,
    assert_kernel_matches,
    assert_nan_stays_in_ignored_rows,
    assert_no_rows_are_no_loss,
    assert_obeys_autocast,
    assert_only_wanted_gradients,
    assert_operators_obey_torch,
    assert_takes_any_strides,
    assert_takes_expanded_gradients,
    fused,
    inputs_of,
    losses_of,
    run,
    some_ignored,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm.native import NAMESPACE
from tfm.native import cross_entropy as implementation
from tfm.operators.chunks import Chunks

pytestmark = native.MARKS
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def chunks_of_3(monkeypatch):
    monkeypatch.setattr(implementation, "logits_rows", lambda *_: 3)


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_matches_in_every_option(name, reduction, dtype, instruction_set, chunks_of_3):
    options = OPTIONS[name]
    inputs, target = inputs_of(9, 24, 65, CPU, dtype, bias=name in ("plain", "everything"))
    target = some_ignored(target, options.get("ignore_index", -100))
    with native.instruction_set(instruction_set):
        assert_kernel_matches(inputs, target, "native", reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_all_logits_share_costs_the_loss_no_digit(dtype):
    # Multiples of 1/4 beside 2^17: fp32 holds each logit, but not their sum.
    input, weight = (torch.randint(-4, 5, (rows, 8)) / 2 for rows in (9, 650))
    target, offset = torch.randint(650, (9,)), torch.full((650,), 2.0**17)
    logits = (input @ weight.T).double().requires_grad_()
    expected = F.cross_entropy(logits, target, label_smoothing=0.3, reduction="none")
    options = {"linear_bias": offset, "label_smoothing": 0.3, "reduction": "none"}
    actual = fused("native")(input.to(dtype), weight.to(dtype), target, **options)
    torch.testing.assert_close(actual, expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-5)


# One class, vectors with a rest, four vectors at once with a rest, one column of input.
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 17), (4, 3, 1000), (70, 8, 9001), (2, 2, 20000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_matches_at_odd_shapes(shape, dtype, instruction_set):
    inputs, target = inputs_of(*shape, CPU, dtype)
    with native.instruction_set(instruction_set):
        assert_kernel_matches(inputs, target, "native", label_smoothing=0.1)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 40),
    dim=st.integers(1, 20),
    classes=st.integers(2, 140),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    seed=st.integers(0, 2**32),
)
def test_native_matches_at_any_shape(rows, dim, classes, dtype, softcap, seed):
    torch.manual_seed(seed)
    inputs, target = inputs_of(rows, dim, classes, CPU, dtype)
    assert_kernel_matches(inputs, target, "native", reduction="none", label_smoothing=0.1, softcap=softcap)


@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_takes_mixed_dtypes(parameter_dtype, reduction):
    dtype = torch.bfloat16 if parameter_dtype == torch.float32 else torch.float32
    inputs, target = inputs_of(6, 24, 33, CPU, dtype, parameter_dtype)
    assert_kernel_matches(inputs, target, "native", reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients_are_computed(needs, reduction, chunks_of_3):
    assert_only_wanted_gradients("native", CPU, needs, reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_takes_any_strides(reduction, chunks_of_3):
    assert_takes_any_strides("native", CPU, reduction)


def test_expanded_gradients():
    assert_takes_expanded_gradients("native", CPU)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(reduction, dtype):
    assert_no_rows_are_no_loss("native", CPU, dtype, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_target_ignored_is_no_loss_and_no_gradient(reduction):
    assert_all_ignored_is_no_loss("native", CPU, torch.bfloat16, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_in_ignored_rows_stays_there(reduction, chunks_of_3):
    assert_nan_stays_in_ignored_rows("native", CPU, reduction)


def test_ignored_rows_cost_nothing_but_a_look(monkeypatch):
    shapes = []
    kernel = implementation.CHUNKS.cross_entropy_
    watched = lambda call: shapes.append(tuple(call.logits.shape)) or kernel(call)  # noqa: E731
    monkeypatch.setattr(
        implementation, "CHUNKS", Chunks(watched, implementation.logits_rows, implementation.CHUNKS.padding)
    )
    inputs, target = inputs_of(8, 8, 17, CPU)
    run(fused("native"), inputs, some_ignored(target))
    assert shapes == [(6, 17)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_obeys_autocast(reduction, chunks_of_3):
    assert_obeys_autocast("native", CPU, torch.bfloat16, reduction)


@pytest.mark.parametrize("wrong", [-1, 17, 10**12])
def test_a_target_that_is_no_class(wrong):
    inputs, target = inputs_of(3, 8, 17, CPU)
    target[1] = wrong
    losses = losses_of(NAMESPACE, *inputs, target)
    spoilt = torch.tensor([False, True, False])
    assert torch.equal(losses.isnan(), spoilt)
    assert torch.equal(torch.autograd.grad(losses.sum(), inputs[0])[0].isnan().all(dim=1), spoilt)


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
def test_logits_at_the_ends_of_their_range(instruction_set):
    input = torch.full((2, 1), 1e4, requires_grad=True)
    weight, target = torch.tensor([[1e4], [-1e4], [0.0]]), torch.tensor([0, 0])
    forbidden = torch.tensor([0.0, float("-inf"), 0.0])
    with native.instruction_set(instruction_set):
        for bias in (None, forbidden):
            loss = fused("native")(input, weight, target, linear_bias=bias, z_loss=1e-20)
            assert loss.isfinite()
            assert torch.autograd.grad(loss, input)[0].isfinite().all()
        # A logit that is not finite is not hidden, wherever it lies in the row.
        for place in (0, 5, 16, 200):
            logits = torch.zeros(1, 201).index_fill(1, torch.tensor(place), float("nan"))
            losses = torch.zeros(1)
            torch.ops.tfm_native.cross_entropy_(
                logits, None, torch.tensor([3]), losses, -100, 0.0, 0.0, None, True, None, None
            )
            assert losses.isnan().all()
            assert logits.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    logits, target = torch.randn(300, 1000).to(dtype), torch.randint(1000, (300,))

    def rows():
        gradient, losses = logits.clone(), torch.empty(300)
        torch.ops.tfm_native.cross_entropy_(
            gradient, None, target, losses, 2, 0.1, 0.01, 3.0, True, torch.linspace(0, 1, 300), None
        )
        return [losses, gradient]

    native.assert_same_bits(rows)


def test_same_inputs_same_bits(chunks_of_3):
    inputs, target = inputs_of(10, 24, 130, CPU)
    first, second = (run(fused("native"), inputs, target, **EVERYTHING) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_gradient_belongs_to_its_receiver():
    """The last backward hands on what the forward formed; what becomes of earlier ones' gradients does not spoil it."""
    inputs, target = inputs_of(5, 8, 17, CPU)
    loss = fused("native")(*inputs[:2], target, linear_bias=inputs[2])
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad.zero_()
    loss.backward(torch.tensor(2.0), retain_graph=True)
    torch.testing.assert_close([x.grad for x in inputs], [2 * grad for grad in first], rtol=0, atol=0)
    torch.testing.assert_close(list(torch.autograd.grad(loss, inputs)), first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_a_chunk_and_the_gradients(dtype, reduction, monkeypatch):
    rows, dim, classes, step = 400, 4, 496, 80
    (input, weight), target = inputs_of(rows, dim, classes, CPU, dtype, bias=False)
    monkeypatch.setattr(implementation, "logits_rows", lambda *_: step)

    def loss_and_gradients():
        loss = fused("native")(input, weight, target, reduction=reduction)
        torch.autograd.grad(loss.sum(), (input, weight))

    peak = allocations.peak_bytes(loss_and_gradients)
    # What torch's products of bf16 take for themselves is the processor's: the logits packed, or their sums in fp32.
    chunk, x = torch.empty(step, classes, dtype=dtype), input.detach()[:step]
    products = (
        lambda: torch.mm(x, weight.detach().t(), out=chunk),
        lambda: torch.mm(chunk, weight.detach()),
        lambda: torch.mm(chunk.t(), x),
    )
    taken = max(allocations.peak_bytes(product) for product in products)
    # The gradients count twice: as formed, in fp32, and as the caller gets them. A row has a few numbers of its own.
    gradients = 4 * (input.numel() + weight.numel())
    assert peak <= chunk.nbytes + taken + 2 * gradients + 64 * rows
    assert peak < allocations.peak_bytes(lambda: F.cross_entropy(F.linear(input, weight), target).backward()) / 2


@given(rows=st.integers(1, 10**8), width=st.integers(1, 10**6), itemsize=st.sampled_from([2, 4]))
def test_chunks_of_logits_fit_their_budget(rows, width, itemsize):
    step = implementation.logits_rows(rows, width, itemsize)
    row = width * itemsize
    assert 1 <= step <= implementation.ROWS[itemsize]
    assert step * row <= max(64 << 20, rows * row // 16) or step == 1
    # Evenly: the last chunk is not a remainder of a few rows.
    chunks = -(-rows // step)
    assert chunks == 1 or rows - (chunks - 1) * step > step - 32 * chunks


def test_operators_obey_torch(chunks_of_3):
    assert_operators_obey_torch(NAMESPACE, CPU, torch.bfloat16)


def test_compiles_whole():
    assert_compiles_whole("native", CPU, "aot_eager")
