"""Weights that are rounded together give what autocast gives, to the last bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from samples import batch_of, small_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tfm import precision
from tfm.model import Transformer

LENGTHS = [(5, 4), (1, 1), (9, 12), (3, 7)]


def step(run, model, batch):
    """The decoder's output and every gradient, from the same dropout masks."""
    torch.manual_seed(3)
    hidden = run(model, batch.source, batch.target_input)
    gradients = torch.autograd.grad(hidden, list(model.parameters()), torch.ones_like(hidden), allow_unused=True)
    return [hidden.detach(), *gradients]


def autocast(model, *arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return model(*arguments)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_the_bits_are_autocasts(norm_first):
    drops = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}
    model, batch = Transformer(small_config(norm_first=norm_first, **drops)), batch_of(LENGTHS)
    results = [step(run, model, batch) for run in (precision.call, autocast)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert all(gradient.dtype == torch.float32 for gradient in results[0][1:])
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


class Casts(TorchDispatchMode):
    """Counts them, by the shape of what is cast."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes[tuple(args[0].shape)] += 1
        return function(*args, **(kwargs or {}))


def test_no_projection_is_cast_alone():
    model, batch = Transformer(small_config()), batch_of(LENGTHS)
    shapes = {tuple(weight.shape) for weight in model.projection_weights().values() if weight.dim() == 2}
    found = []
    for run in (precision.call, autocast):
        with Casts() as casts:
            step(run, model, batch)
        found.append(sum(casts.shapes[shape] for shape in shapes))
    assert found == [0, 2 * sum(weight.dim() == 2 for weight in model.projection_weights().values())]


def test_any_other_module_is_left_to_autocast():
    linear, x = nn.Linear(4, 3), torch.randn(2, 4)
    assert torch.equal(precision.call(linear, x), autocast(linear, x))
    assert precision.call(linear, x).dtype == torch.bfloat16


def test_rounded_weights_have_second_derivatives():
    weights = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    results = []
    for rounded in (precision.Rounded.apply(*weights), [weight.bfloat16() for weight in weights]):
        root = sum(x.float().sin().sum() for x in rounded)
        first = torch.autograd.grad(root, weights, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), weights))
    assert all(x.abs().max() > 0.1 for x in results[1])
    torch.testing.assert_close(*results, rtol=0, atol=0)
