"""What every operation does with its results and with tensors of every kind: changed in place, without values, fake."""

from __future__ import annotations

import native
import pytest
import torch
from operation_samples import DIFFERENTIABLE, NAMED, SAMPLES, curved, on_backends, weights_of
from torch._subclasses.fake_tensor import FakeTensorMode

from tfm import ops

# Results that a backward reads: as torch's own attention and `h = x + r; layer_norm(h)`, they may be changed, but have
# no gradient then.
READ_BY_A_BACKWARD = {
    ("attention", 0),
    ("attention", 1),
    ("attention", 2),
    ("varlen_attention", 0),
    ("residual_layer_norm", 1),
    ("residual_rms_norm", 1),
    # Of ReLU, as in torch.
    ("linear_activation", 0),
}
# Several views of one tensor, of which torch, too, lets none be changed in place.
CHANGEABLE = [sample for sample in DIFFERENTIABLE if sample.operation != "split_heads"]


@pytest.mark.parametrize(("sample", "impl"), on_backends(CHANGEABLE))
def test_results_take_changes_in_place(sample, impl):
    leaves = sample.leaves()
    for place in range(len(sample(*leaves, impl=impl))):
        result, changed = (sample(*leaves, impl=impl)[place] for _ in range(2))
        changed += weights_of(changed)
        expected = result + weights_of(result)
        assert torch.equal(changed, expected)
        gradients = torch.autograd.grad(curved((expected,)), leaves, allow_unused=True)
        found = gradients_unless_changed(curved((changed,)), leaves)
        if found is None:
            assert (sample.operation, place) in READ_BY_A_BACKWARD
        else:
            torch.testing.assert_close(found, gradients)


def gradients_unless_changed(root, leaves):
    """None where autograd says that what the backward reads has changed."""
    try:
        return torch.autograd.grad(root, leaves, allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            return None
        raise


def described(tensors):
    return [(x.shape, x.dtype, x.stride()) for x in tensors]


def every_second(x):
    """The same numbers, none beside another, NaN (or a number that no index takes) in between."""
    filler = float("nan") if x.is_floating_point() else -(10**6)
    between = torch.full_like(x, filler) if x.dtype != torch.bool else ~x
    return torch.stack((x, between), -1).flatten(-2)[..., ::2] if x.dim() else x


@pytest.mark.parametrize(("sample", "impl"), on_backends(SAMPLES))
def test_numbers_may_lie_apart(sample, impl):
    """Every argument, one at a time; the caches of decoding, which are changed, are refused, not copied."""
    leaves = [x.requires_grad_(sample in DIFFERENTIABLE) for x in sample.leaves(requires_grad=False)]

    def results(some, **changes):
        found = sample(*some, impl=impl, **changes)
        return found, torch.autograd.grad(curved(found), some) if sample in DIFFERENTIABLE else ()

    expected = results(leaves)
    for place, leaf in enumerate(leaves):
        apart = every_second(leaf.detach()).requires_grad_(leaf.requires_grad)
        torch.testing.assert_close(results([*leaves[:place], apart, *leaves[place + 1 :]]), expected)
    for name, constant in sample.constants("cpu").items():
        if isinstance(constant, torch.Tensor) and not name.endswith("_cache"):
            torch.testing.assert_close(results(leaves, **{name: every_second(constant)}), expected)


@pytest.mark.parametrize("sample", SAMPLES, **NAMED)
def test_tensors_without_values(sample):
    differentiates = sample in DIFFERENTIABLE
    results = sample(*sample.leaves(requires_grad=differentiates), impl="reference")
    leaves = sample.leaves(device="meta", requires_grad=differentiates)
    found = sample(*leaves, device="meta")
    assert all(x.is_meta for x in found)
    assert [x[:2] for x in described(found)] == [x[:2] for x in described(results)]
    if differentiates:
        gradients = torch.autograd.grad(curved(found), leaves)
        assert [x.shape for x in gradients] == [x.shape for x in leaves]


@pytest.mark.parametrize(("sample", "impl"), on_backends(SAMPLES))
def test_fake_tensors(sample, impl):
    differentiates = sample in DIFFERENTIABLE
    expected = described(sample(*sample.leaves(requires_grad=differentiates), impl=impl))
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(x) for x in sample.leaves(requires_grad=differentiates)]
        results = sample(*leaves, impl=impl)
        assert described(results) == expected
        if differentiates:
            assert [x.shape for x in torch.autograd.grad(curved(results), leaves)] == [x.shape for x in leaves]


def scaled_calls(scale, dtype, impl):
    """Scalars of attention with this scale: of the output, of the weights, and packed."""
    query = torch.arange(40.0, dtype=dtype).view(1, 2, 5, 4).sin()
    output, weights = ops.attention(query, query, query, scale=scale, return_weights=True, impl=impl)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = ops.varlen_attention(*[query[0].transpose(0, 1)] * 3, offsets, offsets, 3, 3, scale=scale, impl=impl)
    return [curved((x,)) for x in (output, weights, packed)]


@pytest.mark.parametrize(
    "impl",
    ["reference", pytest.param("native", marks=native.MARKS[:1]), pytest.param("triton", marks=pytest.mark.triton)],
)
def test_a_scale_learns(impl):
    scale, step = torch.tensor(0.3, requires_grad=True), 1e-4
    above, below = (scaled_calls(0.3 + change, torch.float64, "reference") for change in (step, -step))
    for result, high, low in zip(scaled_calls(scale, torch.float32, impl), above, below, strict=True):
        (found,) = torch.autograd.grad(result, scale, retain_graph=True)
        torch.testing.assert_close(found.double(), (high - low) / (2 * step), rtol=1e-4, atol=1e-5)


REFUSED = [
    ("attention", "softcap"),
    ("attention", "dropout_p"),
    ("varlen_attention", "softcap"),
    ("layer_norm", "eps"),
    ("residual_layer_norm", "eps"),
    ("residual_layer_norm", "dropout_p"),
    ("rms_norm", "weight_offset"),
    ("residual_rms_norm", "eps"),
    ("feed_forward relu", "dropout_p"),
    ("gated_feed_forward", "dropout_p"),
    ("linear_activation", "dropout_p"),
    ("embedding", "scale"),
    ("cross_entropy", "label_smoothing"),
    ("cross_entropy", "z_loss"),
    ("cross_entropy", "softcap"),
    ("linear_cross_entropy", "label_smoothing"),
    ("linear_cross_entropy", "z_loss"),
    ("linear_cross_entropy", "softcap"),
    ("decode_attention", "scale"),
    ("dropout", "dropout_p"),
]


@pytest.mark.parametrize(("name", "argument"), REFUSED)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_number_that_needs_a_gradient_is_refused(name, argument, impl):
    (sample,) = (sample for sample in SAMPLES if sample.name == name)
    leaves = sample.leaves(requires_grad=sample in DIFFERENTIABLE)
    number = torch.tensor(0.4, requires_grad=True)
    with pytest.raises(ValueError, match=rf"^{argument}: expected a number, got a tensor that needs a gradient$"):
        sample(*leaves, impl=impl, **{argument: number})
    call = lambda number: sample(*leaves, impl=impl, **{argument: number})  # noqa: E731
    with pytest.raises(ValueError, match=rf"^{argument}: expected a number"):
        torch.func.jvp(call, (torch.tensor(0.4),), (torch.tensor(1.0),))
    with torch.no_grad():
        assert all(x.isfinite().all() for x in sample(*leaves, impl=impl, **{argument: number.item()}))


def test_class_weights_have_no_gradient_and_say_so():
    input, linear_weight, weight = torch.randn(3, 4), torch.randn(5, 4), torch.ones(5, requires_grad=True)
    with pytest.raises(ValueError, match=r"^weight: expected no gradient, got a weight that requires one: detach it$"):
        ops.linear_cross_entropy(input, linear_weight, torch.tensor([0, 1, 2]), weight=weight)
