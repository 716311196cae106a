"""LayerNorm with bias, dropout and residual: the reference against torch, and the kernel without a residual.

What the kernel does with one is in test_norm.py.
"""

from __future__ import annotations

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops
from tfm.reference import dropout as reference

SEED, SITE = -0x0123456789ABCDEF, 3


def inputs_of(*shape):
    """x, residual, weight, bias and x_bias in float64, all needing gradients."""
    sizes = (shape, shape, shape[-1:], shape[-1:], shape[-1:])
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def add_and_norm(x, residual, weight, bias, x_bias, **options):
    return ops.residual_layer_norm(x, residual, weight, bias, x_bias=x_bias, impl="reference", **options)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 4), max_size=2),
    columns=st.sampled_from([1, 3, 17, 65]),
    weighted=st.booleans(),
    biased=st.booleans(),
)
def test_reference_equals_torch(shape, columns, weighted, biased):
    x = torch.randn(*shape, columns, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(columns, dtype=torch.float64, requires_grad=True) if weighted else None
    bias = torch.randn(columns, dtype=torch.float64, requires_grad=True) if biased else None
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None]
    output = ops.layer_norm(x, weight, bias, 1e-3, impl="reference")
    expected = F.layer_norm(x, (columns,), weight, bias, 1e-3)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    grads, expected_grads = (torch.autograd.grad(y, wanted, cotangent) for y in (output, expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_reference_drops_by_the_mask(p):
    x, residual, weight, bias, x_bias = inputs_of(3, 4, 17)
    y, h = add_and_norm(x, residual, weight, bias, x_bias, dropout_p=p, seed=SEED, site=SITE)
    kept = oracle.kept_elements(SEED, p, 12, 17, site=SITE).view(3, 4, 17)
    torch.testing.assert_close(h, residual + (x + x_bias) * kept * reference.keep_scale(p))
    torch.testing.assert_close(y, F.layer_norm(h, (17,), weight, bias))


def test_reference_gradcheck():
    assert torch.autograd.gradcheck(lambda *inputs: add_and_norm(*inputs, dropout_p=0.3, seed=1), inputs_of(3, 5))


def test_result_in_a_dtype_of_its_own():
    x = torch.randn(9, 65)
    assert torch.equal(ops.layer_norm(x, out_dtype=torch.bfloat16), ops.layer_norm(x).bfloat16())
    y, h = ops.residual_layer_norm(x.bfloat16(), x.bfloat16(), out_dtype=torch.float32)
    assert h.dtype == torch.bfloat16
    assert torch.equal(y, ops.layer_norm(h.float()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm_matches(weighted, biased, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    x, weight, bias = (torch.randn(*s, 130, device=kernel_device, requires_grad=True) for s in ([5], [], []))
    given = {"weight": weight if weighted else None, "bias": bias if biased else None}
    inputs = [tensor for tensor in (x, *given.values()) if tensor is not None]
    wide = {name: None if t is None else t.detach().double().requires_grad_() for name, t in given.items()}
    wide_x = x.detach().double().requires_grad_()
    wide_inputs = [tensor for tensor in (wide_x, *wide.values()) if tensor is not None]
    cotangent = torch.randn_like(x)
    results = []
    for output, needed in (
        (ops.layer_norm(x, **given, impl="triton"), inputs),
        (F.layer_norm(wide_x, (130,), **wide), wide_inputs),
        (F.layer_norm(x, (130,), **given), inputs),
    ):
        results.append([output, *torch.autograd.grad(output, needed, cotangent.to(output.dtype))])
    oracle.assert_all_match(*results, ["y", "x", "weight", "bias"][: len(inputs) + 1])
    assert launched == ["norm_forward_kernel", "norm_backward_kernel", *["sum_partials_kernel"] * (weighted or biased)]


def test_explicit_triton_says_why_not(kernel_device):
    x = torch.randn(2, 17, device=kernel_device)
    with pytest.raises(ValueError, match=r"^layer_norm cannot run with impl='triton': .*got float64$"):
        ops.layer_norm(x.double(), impl="triton")
    with pytest.raises(ValueError, match=r"^residual_layer_norm cannot run with impl='triton': .*got float64$"):
        ops.residual_layer_norm(x, x.double(), impl="triton")
    with pytest.raises(ValueError, match="expected an out_dtype of at most 32 bits, got float64"):
        ops.layer_norm(x, out_dtype=torch.float64, impl="triton")
    with pytest.raises(ValueError, match=r"^out_dtype: expected a floating-point dtype, got torch\.int32$"):
        ops.layer_norm(x, out_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^x_bias: expected shape \(17,\), got \(16,\)$"):
        ops.residual_layer_norm(x, x, x_bias=x[0, :16])
    with pytest.raises(ValueError, match="expected at most 32768 columns, got 32769"):
        ops.layer_norm(torch.zeros(1, 32769, device=kernel_device), impl="triton")
