"""LayerNorm and RMSNorm against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch_pairs import assert_equal_results, pair, results

import tfm.nn


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_norms_equal_torch(shape: tuple[int, ...]) -> None:
    inputs = {"input": torch.randn(4, 2, *shape, dtype=torch.float64)}
    for options in ({}, {"eps": 1e-2}, {"elementwise_affine": False}, {"bias": False}):
        theirs, ours = pair("LayerNorm", shape, **options)
        assert_equal_results(results(ours, inputs, {}), results(theirs, inputs, {}))
    inputs = {"x": inputs["input"]}
    for options in ({}, {"eps": 1e-2}, {"elementwise_affine": False}):
        theirs, ours = pair("RMSNorm", shape, **options)
        assert_equal_results(results(ours, inputs, {}), results(theirs, inputs, {}))


def test_norms_say_what_they_expected() -> None:
    for norm in (tfm.nn.LayerNorm(6), tfm.nn.RMSNorm(6)):
        with pytest.raises(ValueError, match=r"input: expected \[..., 6\], got shape \(2, 1\)"):
            norm(torch.zeros(2, 1))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_a_norm_over_no_dimension_is_refused_as_by_torch(name: str) -> None:
    for library in (torch.nn, tfm.nn):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            getattr(library, name)(())(torch.zeros(3))


def test_per_sample_gradients_by_expanded_weights() -> None:
    theirs, ours = pair("LayerNorm", 6)
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    for norm in (theirs, ours):
        call_for_per_sample_grads(norm, batch_size=4)(x).pow(2).sum().backward()
    for name, parameter in ours.named_parameters():
        expected = getattr(theirs, name).grad_sample
        assert parameter.grad_sample.shape == (4, 6)
        torch.testing.assert_close(parameter.grad_sample, expected, rtol=0, atol=1e-10)
