"""CUDA's LayerNorm and RMSNorm, with bias, dropout and residual, against the oracle: on a GPU, or else emulated.

Emulated, each launch is checked for races and for barriers that not all threads reach: see tests/cuda_emulation.
"""

from __future__ import annotations

from itertools import combinations

import emulated
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norm_cases import NAMES, NORMS, SEED, SHAPES, SITE, assert_matches, fused, inputs_of, run

from tfm import ops
from tfm.reference import dropout as reference

SINGLE, HALF, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [SINGLE, HALF, BFLOAT16]


@pytest.fixture(autouse=True)
def operators(cuda_device, monkeypatch, filled_with_nan):
    return emulated.operators("norm", cuda_device, monkeypatch)


def kernel(norm, p, **options):
    return fused(norm, p, "native", **options)


# Beside the shapes of all norms: whole vectors, of one and of several a lane, and more rows than blocks take at once.
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (70, 64), (3, 1024)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_kernel_matches(cuda_device, norm, dtype, shape):
    assert_matches(norm, inputs_of(norm, shape, cuda_device, dtype), 0.3, "native")


# A team of warps to a row, of vectors and of elements; rows that are read again, in the backward and in both.
LONG = [
    ("layer_norm", BFLOAT16, (3, 2056)), ("rms_norm", HALF, (3, 2049)), ("layer_norm", SINGLE, (5, 4104)),
    ("rms_norm", BFLOAT16, (5, 8200)), ("layer_norm", HALF, (2, 9001)),
]  # fmt: skip
# More rows than all blocks of a GPU take at once.
MANY = [
    ("layer_norm", BFLOAT16, (20_000, 512)), ("rms_norm", HALF, (3, 5000, 65)), ("layer_norm", SINGLE, (3000, 9001)),
]  # fmt: skip
LONG += [pytest.param(*case, marks=pytest.mark.gpu) for case in MANY]


@pytest.mark.parametrize(("norm", "dtype", "shape"), LONG, ids=str)
def test_kernel_matches_for_long_and_many_rows(cuda_device, norm, dtype, shape):
    assert_matches(norm, inputs_of(norm, shape, cuda_device, dtype), 0.3, "native")


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    norm=st.sampled_from(NORMS),
    rows=st.integers(0, 70),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_kernel_matches_at_any_shape(cuda_device, norm, rows, columns, dtype, p, seed):
    torch.manual_seed(seed)
    assert_matches(norm, inputs_of(norm, (rows, columns), cuda_device, dtype), p, "native")


@pytest.mark.parametrize(
    "dtypes",
    [(HALF, HALF, SINGLE), (BFLOAT16, BFLOAT16, SINGLE), (BFLOAT16, SINGLE, SINGLE), (SINGLE, HALF, BFLOAT16)],
    ids=["wide parameters", "bf16, wide parameters", "autocast", "wide x"],
)
@pytest.mark.parametrize("columns", [17, 24])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_kernel_takes_mixed_dtypes(cuda_device, dtypes, columns, p):
    for norm in NORMS:
        assert_matches(norm, inputs_of(norm, (6, columns), cuda_device, *dtypes), p, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 17, 64, 9001])
def test_kernel_draws_the_references_mask(cuda_device, columns, dtype):
    rows, p = 3, 0.4
    x = torch.ones(rows, columns, dtype=dtype, device=cuda_device, requires_grad=True)
    _, h = kernel("layer_norm", p)(x, torch.zeros_like(x))
    h.backward(torch.ones_like(h))
    expected = oracle.kept_elements(SEED, p, rows, columns, site=SITE).to(x) * reference.keep_scale(p)
    assert torch.equal(h, expected)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y only", "h only"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_output_may_go_unused(cuda_device, used, p):
    inputs = inputs_of("layer_norm", (40, 64), cuda_device)
    cotangents = [torch.randn_like(inputs[0]) if wanted else torch.zeros_like(inputs[0]) for wanted in used]
    expected = run(kernel("layer_norm", p), inputs, cotangents)
    given = [c if wanted else None for c, wanted in zip(cotangents, used, strict=True)]
    torch.testing.assert_close(run(kernel("layer_norm", p), inputs, given), expected, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [17, 4104])
def test_only_wanted_gradients_are_computed(cuda_device, columns):
    inputs = inputs_of("layer_norm", (5, columns), cuda_device)
    cotangents = [torch.randn_like(inputs[0]) for _ in range(2)]
    expected = run(kernel("layer_norm", 0.3), inputs, cotangents)[2:]
    names = NAMES["layer_norm"]
    sizes = range(1, 5) if columns == 17 else (1,)
    for subset in (subset for size in sizes for subset in combinations(names, size)):
        some = [tensor.detach().requires_grad_(name in subset) for name, tensor in zip(names, inputs, strict=True)]
        torch.autograd.backward(kernel("layer_norm", 0.3)(*some), cotangents)
        for name, tensor, gradient in zip(names, some, expected, strict=True):
            assert tensor.grad is None if name not in subset else torch.equal(tensor.grad, gradient), (subset, name)


VIEWS = {
    "row stride": lambda x: F.pad(x, (0, 8))[..., :24],
    "row stride of no vectors": lambda x: F.pad(x, (0, 6))[..., :24],
    "column stride": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda x: F.pad(x, (3, 0))[..., 3:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_nothing(cuda_device, view):
    x, residual, *parameters = inputs_of("layer_norm", (3, 4, 24), cuda_device)
    cotangents, function = torch.randn(2, 3, 4, 24, device=cuda_device), kernel("layer_norm", 0.3)
    expected = run(function, [x, residual, *parameters], cotangents)
    viewed = [VIEWS[view](tensor.detach()).requires_grad_() for tensor in (x, residual)]
    apart = [tensor.detach().repeat_interleave(2)[::2].requires_grad_() for tensor in parameters]
    actual = run(function, [*viewed, *apart], [VIEWS[view](cotangent) for cotangent in cotangents])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_expanded_gradients(cuda_device):
    inputs, row = inputs_of("rms_norm", (3, 4, 24), cuda_device), torch.randn(24, device=cuda_device)
    cotangents = [row.expand(3, 4, 24), row[:1].expand(3, 4, 24)]
    expected = run(kernel("rms_norm", 0.3), inputs, [cotangent.contiguous() for cotangent in cotangents])
    torch.testing.assert_close(run(kernel("rms_norm", 0.3), inputs, cotangents), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows(cuda_device, norm):
    inputs = inputs_of(norm, (2, 0, 17), cuda_device)
    y, h, dx, dresidual, *parameters = run(kernel(norm, 0.3), inputs, torch.zeros(2, 2, 0, 17, device=cuda_device))
    assert all(tensor.shape == (2, 0, 17) for tensor in (y, h, dx, dresidual))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in parameters)
    assert all(gradient.shape == (17,) for gradient in parameters)


def test_same_inputs_same_bits_and_rows_do_not_see_their_batch(cuda_device):
    x, residual, *parameters = inputs_of("layer_norm", (100, 65), cuda_device)
    cotangents = torch.randn(2, 100, 65, device=cuda_device)
    many, again = (run(kernel("layer_norm", 0.3), [x, residual, *parameters], cotangents) for _ in range(2))
    torch.testing.assert_close(again, many, rtol=0, atol=0)
    some = [x[:7].detach().requires_grad_(), residual[:7].detach().requires_grad_(), *parameters]
    few = run(kernel("layer_norm", 0.3), some, cotangents[:, :7])
    for all_rows, first_rows in zip(many[:4], few[:4], strict=True):
        assert torch.equal(all_rows[:7], first_rows)


@pytest.mark.parametrize("columns", [65, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"round_first": True}, {"weight_offset": 1.0}, {"out_dtype": BFLOAT16}], ids=str)
def test_rounds_where_the_families_do(cuda_device, options, dtype, columns):
    x, weight = torch.randn(9, columns, device=cuda_device).to(dtype), torch.randn(columns, device=cuda_device)
    found, expected = (ops.rms_norm(x, weight, 1e-5, **options, impl=impl) for impl in ("native", "reference"))
    assert found.dtype == expected.dtype
    # The mean adds up in another order. What that changes in rstd, a rounding to 16 bits rarely shows.
    torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(found.dtype).eps, atol=0)
    if found.dtype != SINGLE:
        assert (found == expected).float().mean() > 0.95


def test_dropped_infinities_are_gone_and_nan_stays(cuda_device):
    residual = torch.randn(3, 24, device=cuda_device)
    _, h = kernel("layer_norm", 1.0)(torch.full_like(residual, torch.inf), residual)
    assert torch.equal(h, residual)
    x = torch.randn(2, 24, device=cuda_device).bfloat16()
    x[0, 3] = torch.nan
    y, h = kernel("rms_norm", 0.0)(x, torch.zeros_like(x))
    assert torch.equal(h.isnan(), x.isnan())
    assert y.isnan().any(1).tolist() == [True, False]


def test_operators_obey_torch(operators, cuda_device):
    x, residual, weight, x_bias, bias = (tensor.detach() for tensor in inputs_of("layer_norm", (5, 17), cuda_device))
    seed, options = torch.tensor(SEED, device=cuda_device), (1e-5, 0.3, SITE, True, 0.0, False)
    arguments = (x, x_bias, residual.half(), weight, bias, seed, *options)
    torch.library.opcheck(operators.residual_norm.default, (*arguments, HALF))
    y, h, statistics = operators.residual_norm(*arguments, None)
    dtypes = [SINGLE, None, HALF, None, SINGLE]
    backward = (y, None, h, statistics, weight, seed, 0.3, SITE, 0.0, *dtypes)
    torch.library.opcheck(operators.residual_norm_backward.default, backward)
