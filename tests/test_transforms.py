"""What torch does with derivatives beyond one backward, over every operation and backend: never a silent zero."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from operation_samples import DIFFERENTIABLE, NAMED, SAMPLES, curved, on_backends, weights_of
from torch.autograd import forward_ad

from tfm import ops

# Where an order of derivatives loses a digit, and other roundings stand at the start.
TOLERANCE = 1e-3


def test_every_operation_has_a_sample():
    without_tensors = {"draw_seed", "rotary_table", "sinusoid"}
    assert {sample.operation for sample in SAMPLES} == set(ops.__all__) - without_tensors


def derivatives(sample, leaves, impl):
    """The gradients of a sum of squares of gradients, and those of a sum of theirs."""
    first = sample.gradients(leaves, impl, create_graph=True)
    root = sum((weights_of(g) * g.square()).sum() for g in first)
    second = torch.autograd.grad(root, leaves, create_graph=True)
    return *second, *torch.autograd.grad(sum(g.sin().sum() for g in second), leaves)


@pytest.mark.parametrize(("sample", "impl"), on_backends(DIFFERENTIABLE))
def test_second_and_third_derivatives(sample, impl):
    truth = derivatives(sample, sample.leaves(torch.float64), "reference")
    assert any(x.abs().max() > 0.01 for x in truth)
    found = derivatives(sample, sample.leaves(), impl)
    for result, true in zip(found, truth, strict=True):
        assert oracle.error(result, true) < TOLERANCE


@pytest.mark.parametrize(("sample", "impl"), on_backends(DIFFERENTIABLE))
def test_gradients_in_batches(sample, impl):
    leaves = sample.leaves()
    results = sample(*leaves, impl=impl)
    batches = [torch.stack([x.detach().sin(), x.detach().cos()]) for x in results]
    found = torch.autograd.grad(results, leaves, batches, is_grads_batched=True, retain_graph=True)
    for place in range(2):
        expected = torch.autograd.grad(results, leaves, [batch[place] for batch in batches], retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[place], other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("sample", DIFFERENTIABLE, **NAMED)
def test_gradients_of_torch_func(sample):
    leaves = sample.leaves(requires_grad=False)
    places = tuple(range(len(leaves)))
    found = torch.func.grad(lambda *given: curved(sample(*given)), places)(*leaves)
    expected = sample.gradients(sample.leaves(), "reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sample", DIFFERENTIABLE, **NAMED)
def test_gradients_of_each_example(sample):
    batch = [torch.stack([x, 2 * x.flip(0)]) for x in sample.leaves(requires_grad=False)]
    gradient = torch.func.grad(lambda *given: curved(sample(*given)), tuple(range(len(batch))))
    found = torch.vmap(gradient)(*batch)
    for place in range(2):
        expected = gradient(*(x[place] for x in batch))
        torch.testing.assert_close([x[place] for x in found], list(expected), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("sample", DIFFERENTIABLE, **NAMED)
def test_tangents(sample):
    """Of forward-mode differentiation, by both of torch's doors, against those that two backwards give."""
    leaves = sample.leaves(torch.float64, requires_grad=False)
    tangents = [x.cos() for x in leaves]
    # To torch, too, the row of padding is constant to a backward alone.
    changes = {"padding_idx": None} if sample.operation == "embedding" else {}
    call = functools.partial(sample, **changes)
    _, found = torch.func.jvp(call, tuple(leaves), tuple(tangents))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(leaves, tangents, strict=True)]
        again = [forward_ad.unpack_dual(x).tangent for x in call(*duals)]
    tracked = sample.leaves(torch.float64)
    results = call(*tracked)
    cotangents = [torch.ones_like(x, requires_grad=True) for x in results]
    pulled = torch.autograd.grad(results, tracked, cotangents, create_graph=True)
    expected = torch.autograd.grad(pulled, cotangents, tangents)
    torch.testing.assert_close(list(found), list(expected))
    torch.testing.assert_close(again, list(expected))


def test_compiled_gradients_of_torch_func():
    """Of every operation, in one graph."""
    leaves = {sample.name: sample.leaves(requires_grad=False) for sample in DIFFERENTIABLE}
    gradients = torch.func.grad(lambda leaves: sum(curved(sample(*leaves[sample.name])) for sample in DIFFERENTIABLE))
    found = torch.compile(gradients, fullgraph=True, backend="aot_eager")(leaves)
    for sample in DIFFERENTIABLE:
        expected = sample.gradients(sample.leaves(), "reference")
        torch.testing.assert_close(
            found[sample.name], list(expected), msg=lambda text, sample=sample: sample.name + text
        )
