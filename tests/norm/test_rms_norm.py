"""RMSNorm against torch.nn.RMSNorm, the rounding orders of the model families, and the residual form."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 4), max_size=2),
    columns=st.sampled_from([1, 3, 17, 65]),
    eps=st.sampled_from([1e-6, 1e-3]),
    weighted=st.booleans(),
)
def test_equals_torch(shape, columns, eps, weighted):
    x = torch.randn(*shape, columns, dtype=torch.float64, requires_grad=True)
    norm = torch.nn.RMSNorm(columns, eps, elementwise_affine=weighted, dtype=torch.float64)
    wanted = [x]
    if weighted:
        torch.nn.init.normal_(norm.weight)
        wanted.append(norm.weight)
    output, expected = ops.rms_norm(x, norm.weight, eps), norm(x)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    grads, expected_grads = (torch.autograd.grad(y, wanted, cotangent) for y in (output, expected))
    torch.testing.assert_close(grads, expected_grads)


def test_gradcheck():
    x, residual = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, weight_offset=1.0), (x, weight))
    x_bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, r, w, b: ops.residual_rms_norm(x, r, w, x_bias=b, dropout_p=0.3, seed=1),
        (x, residual, weight, x_bias),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
def test_errs_no_more_than_torch(dtype, weight_dtype):
    x = (torch.randn(9, 65) * 3).to(dtype).requires_grad_()
    weight = torch.randn(65).to(dtype).to(dtype if weight_dtype == "same" else torch.float32).requires_grad_()
    cotangent = torch.randn(9, 65).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    results = []
    for function, inputs in (
        (ops.rms_norm, (x, weight)),
        (ops.rms_norm, wide),
        (lambda x, w: torch.nn.functional.rms_norm(x, (65,), w.to(x.dtype), 1e-6), (x, weight)),
    ):
        output = function(*inputs)
        results.append([output, *torch.autograd.grad(output, inputs, cotangent.to(output.dtype))])
    assert results[0][0].dtype == dtype
    oracle.assert_all_match(*results, ("output", "x", "weight"))


def llama(x, weight, eps):
    """As LlamaRMSNorm writes it: rounded to the dtype of x before the weight."""
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def t5(x, weight, eps):
    """As T5LayerNorm writes it: rounded to the weight's dtype before the weight, where that has 16 bits."""
    y = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * (y.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else y)


def gemma(x, weight, eps):
    """As GemmaRMSNorm writes it: 1 + weight, rounded last."""
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).type_as(x)


def gpt_oss(x, weight, eps):
    """As GptOssRMSNorm writes it: rounded last."""
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (weight * y).to(x.dtype)


FAMILIES = {
    llama: lambda x, weight: {"round_first": True, "out_dtype": torch.promote_types(x, weight)},
    t5: lambda x, weight: {"round_first": weight.itemsize == 2, "out_dtype": weight},
    gemma: lambda x, weight: {"weight_offset": 1.0},
    gpt_oss: lambda x, weight: {},
}
HALF, SINGLE = torch.float16, torch.float32


@pytest.mark.parametrize("dtypes", [(HALF, HALF), (SINGLE, SINGLE), (HALF, SINGLE), (SINGLE, HALF)], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_rounds_as_the_families_do(family, dtypes, impl, kernel_device):
    x, weight = (
        torch.randn(*size, device=kernel_device).to(d) for size, d in zip([(9, 65), (65,)], dtypes, strict=True)
    )
    options = FAMILIES[family](*dtypes)
    found, expected = ops.rms_norm(x, weight, 1e-5, **options, impl=impl), family(x, weight, 1e-5)
    assert found.dtype == expected.dtype
    if impl == "reference":
        assert torch.equal(found, expected)
        return
    # The kernel's mean adds up in another order. What that changes in rstd, a rounding to 16 bits rarely shows.
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(found.dtype).eps, atol=0)
    if found.dtype == HALF or (x.dtype == HALF and "round_first" in options and options["round_first"]):
        assert (found == expected).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_rounds_as_the_families_do_in_one_dtype(family, dtype):
    x, weight = torch.randn(9, 65).to(dtype), torch.randn(65).to(dtype)
    found = ops.rms_norm(x, weight, 1e-5, **FAMILIES[family](dtype, dtype), impl="reference")
    assert torch.equal(found, family(x, weight, 1e-5))


def test_the_two_orders_differ():
    x, weight = torch.randn(9, 65).bfloat16(), torch.randn(65).bfloat16()
    assert not torch.equal(ops.rms_norm(x, weight, round_first=True), ops.rms_norm(x, weight))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_form_is_dropout_then_sum_then_norm(p):
    x, residual = (torch.randn(2, 3, 9, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(9, dtype=torch.float64)
    y, h = ops.residual_rms_norm(x, residual, weight, 1e-5, p, seed=-4, site=2)
    expected = residual + ops.dropout(x, p, seed=-4, site=2)
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(expected, (9,), weight, 1e-5))


def test_residual_form_normalises_the_stored_h():
    x, residual = torch.randn(9, 65).bfloat16(), torch.randn(9, 65).bfloat16()
    y, h = ops.residual_rms_norm(x, residual)
    assert h.dtype == y.dtype == torch.bfloat16
    assert torch.equal(h, x + residual)
    assert torch.equal(y, ops.rms_norm(h))


def test_residual_stream_may_be_wider():
    y, h = ops.residual_rms_norm(torch.randn(3, 5).bfloat16(), torch.randn(3, 5))
    assert h.dtype == y.dtype == torch.float32


@pytest.mark.parametrize("strided", [lambda x: x.t(), lambda x: x[::2, 1::3], lambda x: x[:1].expand(4, -1)])
def test_takes_any_strides(strided):
    x = strided(torch.randn(12, 12, dtype=torch.float64))
    assert torch.equal(ops.rms_norm(x), ops.rms_norm(x.contiguous()))
