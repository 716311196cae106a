"""The kernel of LayerNorm and RMSNorm, with bias, dropout and residual, against the oracle."""

from __future__ import annotations

from itertools import combinations

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import EPS, NAMES, NORMS, SEED, SHAPES, SITE, assert_matches, fused, inputs_of, run
from oracle import DTYPES, HALVES
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tfm import ops
from tfm.operators.autograd import apply
from tfm.operators.norm import Norm, ResidualNorm
from tfm.reference import dropout as reference

FORWARD, BACKWARD = ["norm_forward_kernel"], ["norm_backward_kernel", "sum_partials_kernel"]


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


def kernel(norm, p, **options):
    return fused(norm, p, "triton", **options)


def assert_kernel_matches(norm, inputs, p, cotangents=None):
    assert_matches(norm, inputs, p, "triton", cotangents)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_kernel_matches(norm, shape, dtype, kernel_device, launched):
    assert_kernel_matches(norm, inputs_of(norm, shape, kernel_device, dtype), p=0.3)
    assert launched == FORWARD + BACKWARD


@settings(deadline=None, max_examples=15)
@given(
    norm=st.sampled_from(NORMS),
    rows=st.integers(0, 70),
    columns=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_kernel_matches_at_any_shape(norm, rows, columns, dtype, p, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_kernel_matches(norm, inputs_of(norm, (rows, columns), device, dtype), p)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "parameter_dtype"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=["wide parameters", "wide residual", "wide x", "autocast"],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm", NORMS)
def test_kernel_takes_mixed_dtypes(norm, dtype, residual_dtype, parameter_dtype, p, kernel_device, launched):
    inputs = inputs_of(norm, (6, 17), kernel_device, dtype, residual_dtype, parameter_dtype)
    assert_kernel_matches(norm, inputs, p)
    assert launched == FORWARD + BACKWARD


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_y_may_be_narrower_than_h(norm, half, kernel_device):
    x, residual, *parameters = inputs_of(norm, (6, 17), kernel_device)
    wide, h = kernel(norm, 0.3)(x, residual, *parameters)
    y, same = kernel(norm, 0.3, out_dtype=half)(x, residual, *parameters)
    assert torch.equal(same, h)
    assert torch.equal(y, wide.to(half))
    cotangent = torch.randn(6, 17, device=kernel_device, dtype=half)
    inputs = [x, residual, *parameters]
    grads = torch.autograd.grad(y, inputs, cotangent)
    torch.testing.assert_close(grads, torch.autograd.grad(wide, inputs, cotangent.float()), rtol=0, atol=0)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y only", "h only"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_kernel_where_one_output_is_used(used, p, kernel_device):
    inputs = inputs_of("layer_norm", (6, 17), kernel_device)
    cotangents = [torch.randn_like(inputs[0]) if wanted else None for wanted in used]
    if used[0]:
        assert_kernel_matches("layer_norm", inputs, p, cotangents)
        return
    _, _, dx, dresidual, dweight, dx_bias, dbias = run(kernel("layer_norm", p), inputs, cotangents)
    expected = reference.dropout(cotangents[1], p, torch.tensor(SEED), SITE)
    assert torch.equal(dresidual, cotangents[1])
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(dx_bias, expected.sum(0))
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 17, 65, 9001])
def test_kernel_draws_the_references_mask(columns, dtype, kernel_device, launched):
    rows, p = 5, 0.4
    x = torch.ones(rows, columns, device=kernel_device, dtype=dtype, requires_grad=True)
    _, h = kernel("layer_norm", p)(x, torch.zeros_like(x))
    h.backward(torch.ones_like(h))
    kept = oracle.kept_elements(SEED, p, rows, columns, site=SITE).to(kernel_device)
    expected = kept.to(dtype) * reference.keep_scale(p)
    assert torch.equal(h, expected)
    assert torch.equal(x.grad, expected)
    assert launched == FORWARD + BACKWARD[:1]


SUBSETS = [
    (norm, subset)
    for norm, sizes in (("layer_norm", range(1, 6)), ("rms_norm", (1, 2)))
    for size in sizes
    for subset in combinations(NAMES[norm], size)
]


@pytest.mark.parametrize(("norm", "subset"), SUBSETS, ids=lambda names: "+".join(names) if names in SUBSETS else names)
def test_only_wanted_gradients_are_computed(norm, subset, kernel_device, launched):
    inputs = inputs_of(norm, (5, 17), kernel_device)
    cotangents = [torch.randn_like(inputs[0]) for _ in range(2)]
    expected = run(kernel(norm, 0.3), inputs, cotangents)[2:]
    launched.clear()
    some = [tensor.detach().requires_grad_(name in subset) for name, tensor in zip(NAMES[norm], inputs, strict=True)]
    torch.autograd.backward(kernel(norm, 0.3)(*some), cotangents)
    for name, tensor, gradient in zip(NAMES[norm], some, expected, strict=True):
        assert tensor.grad is None if name not in subset else torch.equal(tensor.grad, gradient)
    assert launched == FORWARD + (BACKWARD if set(subset) - {"x", "residual"} else BACKWARD[:1])


VIEWS = {
    "row stride": lambda x: F.pad(x, (0, 6))[..., :17],
    "column stride": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda x: F.pad(x, (3, 0))[..., 3:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_nothing(view, kernel_device):
    x, residual, *parameters = inputs_of("layer_norm", (3, 4, 17), kernel_device)
    cotangents = torch.randn(2, 3, 4, 17, device=kernel_device)
    function = kernel("layer_norm", 0.3)
    expected = run(function, [x, residual, *parameters], cotangents)
    viewed = [VIEWS[view](tensor.detach()).requires_grad_() for tensor in (x, residual)]
    parameters = [tensor.detach().repeat_interleave(2)[::2].requires_grad_() for tensor in parameters]
    actual = run(function, [*viewed, *parameters], [VIEWS[view](cotangent) for cotangent in cotangents])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_expanded_gradients(kernel_device):
    inputs = inputs_of("rms_norm", (3, 4, 17), kernel_device)
    ones = torch.ones(3, 4, 17, device=kernel_device)
    expected = run(kernel("rms_norm", 0.3), inputs, [ones, 2 * ones])
    row = torch.ones(17, device=kernel_device)
    cotangents = [row.expand(3, 4, 17), 2 * ones[0, 0, 0].expand(3, 4, 17)]
    torch.testing.assert_close(run(kernel("rms_norm", 0.3), inputs, cotangents), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows(norm, kernel_device, launched):
    inputs = inputs_of(norm, (2, 0, 17), kernel_device)
    y, h, dx, dresidual, *parameters = run(kernel(norm, 0.3), inputs, torch.zeros(2, 2, 0, 17, device=kernel_device))
    assert all(tensor.shape == (2, 0, 17) for tensor in (y, h, dx, dresidual))
    for gradient in parameters:
        assert torch.equal(gradient, torch.zeros(17, device=kernel_device))
    assert launched == FORWARD + BACKWARD


def test_same_inputs_same_bits(kernel_device):
    inputs = inputs_of("layer_norm", (300, 65), kernel_device)
    cotangents = torch.randn(2, 300, 65, device=kernel_device)
    first, second = (run(kernel("layer_norm", 0.3), inputs, cotangents) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_rows_do_not_see_their_batch(kernel_device):
    x, residual, *parameters = inputs_of("layer_norm", (100, 65), kernel_device)
    cotangents = torch.randn(2, 100, 65, device=kernel_device)
    many = run(kernel("layer_norm", 0.3), [x, residual, *parameters], cotangents)
    some = [x[:7].detach().requires_grad_(), residual[:7].detach().requires_grad_(), *parameters]
    few = run(kernel("layer_norm", 0.3), some, cotangents[:, :7])
    for all_rows, first_rows in zip(many[:4], few[:4], strict=True):
        assert torch.equal(all_rows[:7], first_rows)


def test_operators_obey_torch(kernel_device):
    x, residual, weight, x_bias, bias = (
        tensor.detach() for tensor in inputs_of("layer_norm", (5, 17), kernel_device)
    )  # fmt: skip
    seed = torch.tensor(SEED, device=kernel_device)
    operator = torch.ops.tfm.residual_norm.default
    options = (EPS, 0.3, SITE, True, 0.0, False)
    torch.library.opcheck(operator, (x, x_bias, residual.half(), weight, bias, seed, *options, torch.float16))
    torch.library.opcheck(operator, (x, None, None, None, None, None, EPS, 0.0, 0, False, 1.0, True, None))
    y, h, statistics = operator(x, x_bias, residual, weight, bias, seed, *options, None)
    dtypes = [torch.float32, None, torch.float16, None, torch.float32]
    backward = torch.ops.tfm.residual_norm_backward.default
    torch.library.opcheck(backward, (y, None, h, statistics, weight, seed, 0.3, SITE, 0.0, *dtypes))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend, kernel_device, launched):
    inputs = inputs_of("layer_norm", (5, 17), kernel_device)
    dy, dh = torch.randn(2, 5, 17, device=kernel_device)
    torch._dynamo.reset()
    function = kernel("layer_norm", 0.3)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for cotangents in ([dy, dh], [dy, None]):
        expected = run(function, inputs, cotangents)
        torch.testing.assert_close(run(compiled, inputs, cotangents), expected, rtol=0, atol=0)
    normalise = torch.compile(lambda x: ops.rms_norm(x, impl="triton"), backend=backend, fullgraph=True)
    assert torch.equal(normalise(inputs[0]), ops.rms_norm(inputs[0], impl="triton"))


def test_checkpoint_draws_the_same_mask(kernel_device, launched):
    inputs = inputs_of("layer_norm", (5, 17), kernel_device)
    function = kernel("layer_norm", 0.5, seed=None)
    cotangents = torch.randn(2, 5, 17, device=kernel_device)
    results = []
    for wrapped in (function, lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(run(wrapped, inputs, cotangents))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert launched == FORWARD + BACKWARD + FORWARD + FORWARD + BACKWARD


@pytest.mark.filterwarnings("ignore:invalid value")
def test_dropped_infinities_are_gone(kernel_device):
    x = torch.full((3, 17), torch.inf, device=kernel_device)
    residual = torch.randn(3, 17, device=kernel_device)
    _, h = kernel("layer_norm", 1.0)(x, residual)
    assert torch.equal(h, residual)


def test_the_function_itself_is_for_one_backward_alone(kernel_device):
    from tfm.ops.registry import NAMESPACE

    x = torch.randn(3, 17, device=kernel_device, requires_grad=True)

    def call(x, centred):
        return ResidualNorm(x, None, None, None, None, None, 1e-5, 0.0, 0, centred, 0.0, False, None)

    for function in (
        lambda x: apply(Norm, NAMESPACE, call(x, centred=True))[0],
        lambda x: apply(Norm, NAMESPACE, call(x, centred=False))[0],
    ):
        with pytest.raises(RuntimeError, match=r"must override the setup_context|Batching rule not implemented"):
            torch.vmap(function)(x)
        with pytest.raises(RuntimeError, match="must override the setup_context"):
            torch.func.jvp(function, (x.detach(),), (x.detach(),))
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="forward mode AD"):
            function(forward_ad.make_dual(x.detach(), x.detach()))
