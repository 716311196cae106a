"""LayerNorm with dropout and residual: the reference against torch, the Triton kernel against the oracle."""

from __future__ import annotations

from itertools import combinations

import launches
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tfm import ops
from tfm.kernels import layer_norm as kernels
from tfm.reference import dropout as reference

FORWARD, BACKWARD = ["layer_norm_forward_kernel"], ["layer_norm_backward_kernel", "sum_partials_kernel"]
NAMES = ("x", "residual", "weight", "bias")
RESULTS = ("y", "h", "dx", "dresidual", "dweight", "dbias")
# Triton's interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SEED, SITE = -0x0123456789ABCDEF, 3


@pytest.fixture
def launched(monkeypatch):
    return launches.watch(monkeypatch)


def inputs_of(shape, device, dtype=torch.float32, residual_dtype=None, parameter_dtype=None):
    """x, residual, weight and bias of an "Add & Norm", all needing gradients."""
    x, residual = torch.randn(2, *shape, device=device)
    weight, bias = torch.randn(2, shape[-1], device=device)
    dtypes = (dtype, residual_dtype or dtype, parameter_dtype or dtype, parameter_dtype or dtype)
    given = zip((x, residual, weight, bias), dtypes, strict=True)
    return [tensor.to(kind).requires_grad_() for tensor, kind in given]


def run(function, inputs, cotangents):
    """(y, h, dx, dresidual, dweight, dbias); output i is weighed by cotangent i, not used where that is None."""
    outputs = function(*inputs)
    used = [(y, c.to(y.dtype)) for y, c in zip(outputs, cotangents, strict=True) if c is not None]
    grads = torch.autograd.grad([y for y, _ in used], inputs, [c for _, c in used])
    return [*(output.detach() for output in outputs), *grads]


def kernel(p):
    return lambda *inputs: ops.residual_layer_norm(*inputs, dropout_p=p, seed=SEED, site=SITE, impl="triton")


def plain(p):
    """The same composed of torch's operations, in the dtype of the inputs."""

    def add_and_norm(x, residual, weight, bias):
        h = residual + reference.dropout(x, p, torch.tensor(SEED), SITE)
        return F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype)), h

    return add_and_norm


def assert_kernel_matches(inputs, p, cotangents=None):
    if cotangents is None:
        cotangents = [torch.randn_like(inputs[0], dtype=torch.float32) for _ in range(2)]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    actual = run(kernel(p), inputs, cotangents)
    truth, same = run(plain(p), wide, cotangents), run(plain(p), inputs, cotangents)
    oracle.assert_all_match(actual, truth, same, RESULTS)
    for result, tensor in zip(actual[2:], inputs, strict=True):
        assert result.dtype == tensor.dtype


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
    x, residual, weight, bias = (t.detach().double() for t in inputs_of((3, 4, 17), "cpu"))
    y, h = ops.residual_layer_norm(
        x, residual, weight, bias, dropout_p=p, seed=SEED, site=SITE, impl="reference"
    )  # fmt: skip
    kept = oracle.kept_elements(SEED, p, 12, 17, site=SITE).view(3, 4, 17)
    torch.testing.assert_close(h, residual + x * kept * reference.keep_scale(p))
    torch.testing.assert_close(y, F.layer_norm(h, (17,), weight, bias))


def test_reference_gradcheck():
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs_of((3, 5), "cpu")]
    function = lambda *inputs: ops.residual_layer_norm(*inputs, dropout_p=0.3, seed=1, impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)


# Rows that share a tile, tiles that programs stride over, rows of one column and of several chunks.
SHAPES = [(1, 1), (7, 1), (5, 3), (2, 3, 17), (70, 65), (33, 130), (9, 512), (2, 3, 1000), (2, 9000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_matches(shape, dtype, kernel_device, launched):
    assert_kernel_matches(inputs_of(shape, kernel_device, dtype), p=0.3)
    assert launched == FORWARD + BACKWARD


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_kernel_matches_at_any_shape(rows, columns, dtype, p):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_kernel_matches(inputs_of((rows, columns), device, dtype), p)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "parameter_dtype"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float16),
        pytest.param(torch.bfloat16, torch.float32, torch.float32, marks=pytest.mark.gpu),
    ],
    ids=["wide parameters", "wide residual", "wide x", "autocast"],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_kernel_takes_mixed_dtypes(dtype, residual_dtype, parameter_dtype, p, kernel_device, launched):
    inputs = inputs_of((6, 17), kernel_device, dtype, residual_dtype, parameter_dtype)
    assert_kernel_matches(inputs, p)
    assert launched == FORWARD + BACKWARD


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y only", "h only"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_kernel_where_one_output_is_used(used, p, kernel_device):
    inputs = inputs_of((6, 17), kernel_device)
    cotangents = [torch.randn_like(inputs[0]) if wanted else None for wanted in used]
    if used[0]:
        assert_kernel_matches(inputs, p, cotangents)
        return
    _, _, dx, dresidual, dweight, dbias = run(kernel(p), inputs, cotangents)
    assert torch.equal(dresidual, cotangents[1])
    torch.testing.assert_close(dx, reference.dropout(cotangents[1], p, torch.tensor(SEED), SITE))
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 17, 65, 9001])
def test_kernel_draws_the_references_mask(columns, dtype, kernel_device, launched):
    rows, p = 5, 0.4
    x = torch.ones(rows, columns, device=kernel_device, dtype=dtype, requires_grad=True)
    _, h = kernel(p)(x, torch.zeros_like(x), None, None)
    h.backward(torch.ones_like(h))
    kept = oracle.kept_elements(SEED, p, rows, columns, site=SITE).to(kernel_device)
    expected = kept.to(dtype) * reference.keep_scale(p)
    assert torch.equal(h, expected)
    assert torch.equal(x.grad, expected)
    assert launched == FORWARD + BACKWARD[:1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm_matches(weighted, biased, kernel_device, launched):
    x, _, weight, bias = inputs_of((5, 130), kernel_device)
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
    oracle.assert_all_match(*results, ["y", *NAMES][: len(inputs) + 1])
    assert launched == FORWARD + (BACKWARD if weighted or biased else BACKWARD[:1])


SUBSETS = [subset for size in range(1, 5) for subset in combinations(range(4), size)]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(NAMES[i] for i in subset))
def test_only_wanted_gradients_are_computed(subset, kernel_device, launched):
    inputs = inputs_of((5, 17), kernel_device)
    cotangents = [torch.randn_like(inputs[0]) for _ in range(2)]
    expected = run(kernel(0.3), inputs, cotangents)[2:]
    launched.clear()
    some = [tensor.detach().requires_grad_(i in subset) for i, tensor in enumerate(inputs)]
    torch.autograd.backward(kernel(0.3)(*some), cotangents)
    for i, tensor in enumerate(some):
        assert tensor.grad is None if i not in subset else torch.equal(tensor.grad, expected[i])
    assert launched == FORWARD + (BACKWARD if max(subset) >= 2 else BACKWARD[:1])


VIEWS = {
    "row stride": lambda x: F.pad(x, (0, 6))[..., :17],
    "column stride": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda x: F.pad(x, (3, 0))[..., 3:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_nothing(view, kernel_device):
    x, residual, weight, bias = inputs_of((3, 4, 17), kernel_device)
    cotangents = torch.randn(2, 3, 4, 17, device=kernel_device)
    expected = run(kernel(0.3), [x, residual, weight, bias], cotangents)
    viewed = [VIEWS[view](tensor.detach()).requires_grad_() for tensor in (x, residual)]
    parameters = [tensor.detach().repeat_interleave(2)[::2].requires_grad_() for tensor in (weight, bias)]
    actual = run(kernel(0.3), [*viewed, *parameters], [VIEWS[view](cotangent) for cotangent in cotangents])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_expanded_gradients(kernel_device):
    inputs = inputs_of((3, 4, 17), kernel_device)
    ones = torch.ones(3, 4, 17, device=kernel_device)
    expected = run(kernel(0.3), inputs, [ones, 2 * ones])
    row = torch.ones(17, device=kernel_device)
    actual = run(kernel(0.3), inputs, [row.expand(3, 4, 17), 2 * ones[0, 0, 0].expand(3, 4, 17)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_no_rows(kernel_device, launched):
    inputs = inputs_of((2, 0, 17), kernel_device)
    *rows, dweight, dbias = run(kernel(0.3), inputs, torch.zeros(2, 2, 0, 17, device=kernel_device))
    assert all(tensor.shape == (2, 0, 17) for tensor in rows)
    assert torch.equal(dweight, torch.zeros_like(dweight))
    assert torch.equal(dbias, torch.zeros_like(dbias))
    assert launched == FORWARD + BACKWARD


def test_same_inputs_same_bits(kernel_device):
    inputs = inputs_of((300, 65), kernel_device)
    cotangents = torch.randn(2, 300, 65, device=kernel_device)
    first, second = (run(kernel(0.3), inputs, cotangents) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_rows_do_not_see_their_batch(kernel_device):
    x, residual, weight, bias = inputs_of((100, 65), kernel_device)
    cotangents = torch.randn(2, 100, 65, device=kernel_device)
    many = run(kernel(0.3), [x, residual, weight, bias], cotangents)
    some = [x[:7].detach().requires_grad_(), residual[:7].detach().requires_grad_(), weight, bias]
    few = run(kernel(0.3), some, cotangents[:, :7])
    for all_rows, first_rows in zip(many[:4], few[:4], strict=True):
        assert torch.equal(all_rows[:7], first_rows)


def test_operators_obey_torch(kernel_device):
    x, residual, weight, bias = (tensor.detach() for tensor in inputs_of((5, 17), kernel_device))
    seed = torch.tensor(SEED, device=kernel_device)
    operator = torch.ops.tfm.residual_layer_norm.default
    torch.library.opcheck(operator, (x, residual.half(), weight, bias, 1e-5, 0.3, seed, SITE))
    torch.library.opcheck(operator, (x, None, None, None, 1e-5, 0.0, None, 0))
    y, h, mean, rstd = operator(x, residual, weight, bias, 1e-5, 0.3, seed, SITE)
    dtypes = [torch.float32, torch.float16, None, torch.float32]
    backward = torch.ops.tfm.residual_layer_norm_backward.default
    torch.library.opcheck(backward, (y, None, h, mean, rstd, weight, 0.3, seed, SITE, *dtypes))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend, kernel_device, launched):
    inputs = inputs_of((5, 17), kernel_device)
    dy, dh = torch.randn(2, 5, 17, device=kernel_device)
    torch._dynamo.reset()
    compiled = torch.compile(kernel(0.3), backend=backend, fullgraph=True)
    for cotangents in ([dy, dh], [dy, None]):
        expected = run(kernel(0.3), inputs, cotangents)
        torch.testing.assert_close(run(compiled, inputs, cotangents), expected, rtol=0, atol=0)
    normalise = torch.compile(lambda x: ops.layer_norm(x, impl="triton"), backend=backend, fullgraph=True)
    assert torch.equal(normalise(inputs[0]), ops.layer_norm(inputs[0], impl="triton"))


def test_checkpoint_draws_the_same_mask(kernel_device, launched):
    inputs = inputs_of((5, 17), kernel_device)
    function = lambda *inputs: ops.residual_layer_norm(*inputs, dropout_p=0.5, impl="triton")  # noqa: E731
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
    _, h = kernel(1.0)(x, residual, None, None)
    assert torch.equal(h, residual)


def test_explicit_triton_says_why_not(kernel_device):
    x = torch.randn(2, 17, device=kernel_device)
    with pytest.raises(ValueError, match=r"^layer_norm cannot run with impl='triton': .*got float64$"):
        ops.layer_norm(x.double(), impl="triton")
    with pytest.raises(ValueError, match=r"^residual_layer_norm cannot run with impl='triton': .*got float64$"):
        ops.residual_layer_norm(x, x.double(), impl="triton")
    with pytest.raises(ValueError, match="expected at most 32768 columns, got 32769"):
        ops.layer_norm(torch.zeros(1, 32769, device=kernel_device), impl="triton")


def test_refuses_what_it_cannot_differentiate(kernel_device):
    x = torch.randn(3, 17, device=kernel_device, requires_grad=True)
    function = lambda x: kernels.layer_norm(x, None, None, 1e-5)  # noqa: E731
    with pytest.raises(RuntimeError, match="ResidualLayerNorm, but it does not have vmap support"):
        torch.vmap(function)(x)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(function, (x.detach(),), (x.detach(),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        function(forward_ad.make_dual(x.detach(), x.detach()))
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
