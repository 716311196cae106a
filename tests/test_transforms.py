"""What torch does with derivatives beyond one backward, over every operation and backend: never a silent zero."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from operation_samples import DIFFERENTIABLE, NAMED, SAMPLES, curved, on_backends, weights_of
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import tfm.nn
from tfm import ops

# Where an order of derivatives loses a digit, and other roundings stand at the start.
TOLERANCE = 1e-3
# By torch.nn.LayerNorm in float64.
MAML = 0.0564619


def test_every_operation_has_a_sample():
    without_tensors = {"alibi_slopes", "draw_seed", "rotary_table", "sinusoid"}
    in_torch = {"alibi_bias", "t5_bias"}
    assert {sample.operation for sample in SAMPLES} == set(ops.__all__) - without_tensors - in_torch


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
    """In one graph, of an operation for each Function that kernels have."""
    chosen = "attention", "residual_layer_norm", "feed_forward", "linear_cross_entropy", "embedding", "rotary"
    samples = {sample.operation: sample for sample in DIFFERENTIABLE if sample.operation in chosen}
    leaves = {name: sample.leaves(requires_grad=False) for name, sample in samples.items()}
    gradients = torch.func.grad(lambda leaves: sum(curved(samples[name](*given)) for name, given in leaves.items()))
    found = torch.compile(gradients, fullgraph=True, backend="aot_eager")(leaves)
    expected = {name: list(sample.gradients(sample.leaves(), "reference")) for name, sample in samples.items()}
    torch.testing.assert_close(found, expected)


def random_calls():
    """Functions of one example that draw seeds of their own."""
    layer = tfm.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    weight = torch.eye(8)
    return {
        "dropout": lambda x: ops.dropout(x, 0.5),
        "attention": lambda x: ops.attention(*[x[None, None]] * 3, dropout_p=0.5),
        "residual_layer_norm": lambda x: ops.residual_layer_norm(x, x, dropout_p=0.5)[1],
        "feed_forward": lambda x: ops.feed_forward(x, weight, None, weight, None, "gelu", 0.5),
        "embedding": lambda x: ops.embedding(torch.arange(5), x, torch.arange(5), dropout_p=0.5),
        "layer": lambda x: layer(x[None]),
    }


@pytest.mark.parametrize("name", random_calls())
def test_randomness_under_vmap(name):
    call, x = random_calls()[name], torch.ones(2, 5, 8)
    different = torch.vmap(call, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    same = torch.vmap(call, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        torch.vmap(call)(x)


def test_seeds_of_each_example():
    x, seeds = torch.randn(3, 2, 9), torch.tensor([5, -6, 7])
    found = torch.vmap(lambda x, seed: ops.dropout(x, 0.4, seed=seed))(x, seeds)
    expected = [ops.dropout(x[place], 0.4, seed=seeds[place]) for place in range(3)]
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("library", [torch.nn, tfm.nn], ids=["torch", "tfm"])
def test_a_step_through_a_layer_norm(library):
    """The loss after an inner step, differentiated by the weights before it, as in MAML."""
    torch.manual_seed(3)
    norm, linear = library.LayerNorm(6), torch.nn.Linear(6, 6)
    x = torch.randn(4, 6)
    inner = (linear(norm(x)) - x.cos()).square().mean()
    given = [*norm.parameters(), *linear.parameters()]
    steps = torch.autograd.grad(inner, given, create_graph=True)
    weight, bias, *matrix = (p - 0.5 * step for p, step in zip(given, steps, strict=True))
    layer_norm = ops.layer_norm if library is tfm.nn else lambda x, w, b: torch.nn.functional.layer_norm(x, (6,), w, b)
    outer = torch.nn.functional.linear(layer_norm(x, weight, bias), *matrix).square().mean()
    torch.testing.assert_close(torch.autograd.grad(outer, norm.weight)[0].norm(), torch.tensor(MAML))


def encoder_layer():
    torch.manual_seed(3)
    layer = tfm.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return layer, torch.randn(2, 5, 8)


def test_a_layers_gradients_of_each_example():
    layer, x = encoder_layer()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    gradient = torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x[None],)).sin().sum())
    found = torch.vmap(gradient, in_dims=(None, 0))(parameters, x)
    for name, parameter in layer.named_parameters():
        expected = [torch.autograd.grad(layer(x[place : place + 1]).sin().sum(), parameter)[0] for place in range(2)]
        torch.testing.assert_close(found[name], torch.stack(expected), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_layers_jacobian_in_one_batch():
    layer, x = encoder_layer()
    found, expected = (
        torch.autograd.functional.jacobian(lambda x: layer(x).sum(dim=(0, 1)), x, vectorize=together)
        for together in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_layers_backward_as_compiled_autograd_has_it():
    layer, x = encoder_layer()
    expected = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    root = layer(x).sin().sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        root.backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "MultiheadAttention", "LayerNorm"])
def test_modules_without_values(kind):
    arguments = {"MultiheadAttention": (8, 2), "LayerNorm": (8,), "TransformerEncoderLayer": (8, 2, 16)}[kind]
    module = getattr(tfm.nn, kind)(*arguments, device="meta")
    x = torch.empty(5, 3, 8, device="meta", requires_grad=True)
    output = module(x, x, x)[0] if kind == "MultiheadAttention" else module(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert output.is_meta
    assert gradient.is_meta
    assert output.shape == gradient.shape == x.shape


def test_a_model_of_fake_tensors():
    model = tfm.nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    with FakeTensorMode() as mode:
        parameters = {name: mode.from_tensor(parameter) for name, parameter in model.named_parameters()}
        padding = torch.zeros(3, 5, dtype=torch.bool)
        masks = {"src_key_padding_mask": padding, "tgt_mask": torch.ones(4, 4, dtype=torch.bool).triu(1)}
        given = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
        output = torch.func.functional_call(model, parameters, given, masks)
        gradients = torch.autograd.grad(output.sum(), list(parameters.values()))
    assert output.shape == (3, 4, 8)
    assert [x.shape for x in gradients] == [x.shape for x in model.parameters()]
