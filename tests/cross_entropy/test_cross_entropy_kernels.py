"""The loss of a linear layer as kernels against float64: values and gradients in every option, shape and dtype."""

from __future__ import annotations

from itertools import product

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    EVERYTHING,
    MEAN,
    OPTIONS,
    ROW,
    STREAM,
    assert_kernel_matches,
    assert_no_rows_are_no_loss,
    assert_obeys_autocast,
    assert_only_wanted_gradients,
    assert_takes_any_strides,
    assert_takes_expanded_gradients,
    inputs_of,
    kernel,
    run,
    some_ignored,
    streams,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, HALVES

from tfm.kernels.launch import cross_entropy as launch


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


@pytest.fixture
def chunks_of_3(monkeypatch):
    monkeypatch.setattr(launch, "logits_rows", lambda rows, classes, itemsize: 3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_in_every_option(name, reduction, dtype, kernel_device, chunks_of_3, launched):
    options = OPTIONS[name]
    inputs, target = inputs_of(7, 24, 65, kernel_device, dtype, bias=name in ("plain", "everything"))
    target = some_ignored(target, options.get("ignore_index", -100))
    assert_kernel_matches(inputs, target, reduction=reduction, **options)
    forward = STREAM if streams(kernel_device, dtype) else [ROW] * 3
    assert launched == (forward + [ROW] * 3 if reduction == "none" else [ROW] * 3 + [MEAN])


# One class, vectors with a rest, several blocks of classes with a rest, rows of one column.
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 17), (4, 3, 1000), (2, 8, 9001), (2, 2, 20000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_at_odd_shapes(shape, dtype, kernel_device, launched):
    inputs, target = inputs_of(*shape, kernel_device, dtype)
    assert_kernel_matches(inputs, target, label_smoothing=0.1)
    assert launched == [ROW, MEAN]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 0.8}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_label_may_be_in_any_block(dtype, options, kernel_device):
    """A row of five blocks: the edges of the first, of one between, and of the last, whose end is padding."""
    target = torch.tensor([0, 4095, 4096, 12287, 16384, 19990], device=kernel_device)
    inputs, _ = inputs_of(len(target), 3, 19991, kernel_device, dtype)
    for bias in (True, False):
        assert_kernel_matches(inputs if bias else inputs[:2], target, **options)


@pytest.mark.parametrize("size", [1e5, -1e5, -1e9, -1e30])
def test_gradients_of_huge_equal_logits(size, kernel_device):
    """All classes are shifted alike, as by a mask, which plain torch takes away before it rounds anything."""
    (input, weight, bias), target = inputs_of(3, 8, 5000, kernel_device)
    inputs = [x.detach().zero_().requires_grad_() for x in (input, weight)]
    inputs.append(torch.full_like(bias, size).requires_grad_())
    loss, *grads = run(kernel, inputs, target)
    truth = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(oracle.linear_cross_entropy, truth, target)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[2].double(), expected[3], rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(0, 6),
    dim=st.integers(1, 20),
    classes=st.integers(1, 70),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignore_index=st.sampled_from([-100, 0, 1]),
    biased=st.booleans(),
)
def test_equals_cross_entropy(rows, dim, classes, reduction, smoothing, ignore_index, biased):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (input, weight, *bias), target = inputs_of(rows, dim, classes, device, bias=biased)
    linear_bias = bias[0] if bias else None
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
    loss = kernel(input, weight, target, linear_bias=linear_bias, **options)
    grads = torch.autograd.grad(loss.sum(), (input, weight, *bias))
    if (target == ignore_index).all():  # torch's mean over nothing is NaN
        assert all((x == 0).all() for x in (loss, *grads))
        return
    wide = [x.detach().double().requires_grad_() for x in (input, weight, *bias)]
    expected = F.cross_entropy(F.linear(*wide), target, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        [x.double() for x in grads], list(torch.autograd.grad(expected.sum(), wide)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "parameter_dtype"), [*product(HALVES, DTYPES[:1]), *product(DTYPES[:1], HALVES)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_takes_mixed_dtypes(dtype, parameter_dtype, reduction, kernel_device):
    inputs, target = inputs_of(6, 24, 33, kernel_device, dtype, parameter_dtype)
    assert_kernel_matches(inputs, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("needs", list(product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients_are_computed(needs, reduction, kernel_device, chunks_of_3):
    assert_only_wanted_gradients("triton", kernel_device, needs, reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_takes_any_strides(reduction, kernel_device, chunks_of_3):
    assert_takes_any_strides("triton", kernel_device, reduction)


def test_expanded_gradients(kernel_device):
    assert_takes_expanded_gradients("triton", kernel_device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(reduction, dtype, kernel_device, launched):
    assert_no_rows_are_no_loss("triton", kernel_device, dtype, reduction)


def test_one_class_has_no_loss(kernel_device):
    inputs, _ = inputs_of(5, 8, 1, kernel_device)
    target = torch.zeros(5, dtype=torch.int64, device=kernel_device)
    assert all((x == 0).all() for x in run(kernel, inputs, target, label_smoothing=0.1))


def test_same_inputs_same_bits(kernel_device, chunks_of_3):
    inputs, target = inputs_of(10, 24, 130, kernel_device)
    first, second = (run(kernel, inputs, target, **EVERYTHING) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_obeys_autocast(reduction, half, kernel_device, chunks_of_3):
    assert_obeys_autocast("triton", kernel_device, half, reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_gradients_do_not_underflow(reduction, kernel_device):
    """A mean over many tokens, by either way: 1e-4 · 2⁻¹⁴ is 0 in half precision."""
    (input, weight), _ = inputs_of(8, 8, 16, kernel_device, torch.float16, bias=False)
    input = (input.detach() / 8).requires_grad_()
    bias = torch.zeros(16, device=kernel_device).index_fill(0, torch.tensor(0, device=kernel_device), 9.0)
    target = torch.zeros(8, dtype=torch.int64, device=kernel_device)
    results = []
    for function, kind in ((kernel, torch.float16), (oracle.linear_cross_entropy, torch.float64)):
        given = [x.detach().to(kind).requires_grad_() for x in (input, weight)]
        loss = function(*given, target, linear_bias=bias.to(kind), reduction=reduction)
        # The factor of the backward comes in fp32, and the gradient leaves in the weight's dtype: scaled up again.
        small = (loss * 2.0**-14).sum() * 2.0**14
        results.append(torch.autograd.grad(small, given))
    for actual, truth in zip(*results, strict=True):
        assert oracle.error(actual, truth) < 4 * torch.finfo(torch.float16).eps


def test_what_no_kernel_does_is_said(kernel_device):
    (input, weight), target = inputs_of(3, 8, 17, kernel_device, bias=False)
    alone = "class weights and probability targets run on the reference alone"
    with pytest.raises(ValueError, match=f"^linear_cross_entropy cannot run with impl='triton': {alone}$"):
        kernel(input, weight, target, weight=torch.ones(17, device=kernel_device))
    with pytest.raises(ValueError, match=alone):
        kernel(input, weight, torch.ones(3, 17, device=kernel_device) / 17)


@given(rows=st.integers(1, 10**8), classes=st.integers(1, 10**6), itemsize=st.sampled_from([2, 4]))
def test_chunks_of_logits_fit_their_budget(rows, classes, itemsize):
    step = launch.logits_rows(rows, classes, itemsize)
    logits = rows * classes * itemsize
    budget = min(max(128 << 20, logits // 16), 512 << 20)
    assert step == rows or step % 128 == 0
    assert min(step, rows) * classes * itemsize <= budget + 128 * classes * itemsize
    # Evenly: the last chunk is not a remainder of a few rows.
    chunks = -(-rows // step)
    assert chunks == 1 or step - 128 <= -(-rows // chunks) <= step


@given(classes=st.integers(1, 10**6))
def test_tiles_cover_the_classes(classes):
    tiles = launch.cross_entropy(classes, torch.bfloat16, has_bias=False, has_softcap=False, major=9)
    assert (tiles.chunks - 1) * tiles.block < classes <= tiles.chunks * tiles.block
    assert tiles.block == 8 * 32 * tiles.num_warps
    assert tiles.num_warps <= 32
