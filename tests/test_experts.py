"""The mixture of experts: the reference against a sum written out, kernels against the oracle, separate tensors."""

from __future__ import annotations

import launches
import native
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES
from torch.nn import functional as F

from tfm import ops
from tfm.ops.experts import MOST_SEPARATE

BACKENDS = [
    pytest.param("triton", marks=pytest.mark.triton),
    pytest.param("native", marks=native.MARKS[:1]),
]
NAMES = ("x", "top_k_weights", "first_weight", "second_weight", "first_bias", "second_bias")
# Tokens, places, experts, H, I: no tokens, one, fewer than experts, rests of tiles, an expert with many tiles.
SIZES = [(0, 2, 3, 8, 4), (1, 1, 1, 1, 1), (3, 2, 9, 16, 24), (37, 3, 5, 48, 33), (150, 2, 2, 20, 130)]
LAUNCHES = [
    "experts_keys_kernel", "experts_order_kernel", "experts_hidden_kernel", "experts_product_kernel",
    "experts_sum_kernel", "experts_hidden_backward_kernel", "experts_product_kernel", "experts_sum_kernel",
    "experts_routing_gradient_kernel", "experts_weight_gradient_kernel", "experts_weight_gradient_kernel",
    "experts_bias_gradient_kernel", "experts_bias_gradient_kernel",
]  # fmt: skip


def make(size, dtype, gated=True, device="cpu", bias=True):
    """The leaves by their names, biases where wanted, and an index of which some are outside."""
    tokens, places, experts, depth, columns = size
    width = 2 * columns if gated else columns
    shapes = (tokens, depth), (tokens, places), (experts, width, depth), (experts, depth, columns)
    shapes += ((experts, width), (experts, depth)) if bias else ()
    leaves = {
        name: (0.5 * torch.randn(shape, device=device)).to(dtype) for name, shape in zip(NAMES, shapes, strict=False)
    }
    index = torch.randint(-1, experts + 1, (tokens, places), device=device)
    # One expert without tokens.
    return leaves, torch.where(index == 1, 0, index)


def run(impl, leaves, index, cotangent, separate=False, **options):
    """y and all gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    given = dict(leaves)
    if separate:
        for name in set(given) & {*NAMES[2:]}:
            given[name] = list(given[name].unbind())
    y = ops.experts(top_k_index=index, **given, impl=impl, **options)
    return [y.detach(), *torch.autograd.grad(y, [*leaves.values()], cotangent.to(y.dtype))]


def assert_matches(impl, leaves, index, roundings=oracle.ROUNDINGS, separate=False, **options):
    cotangent = torch.randn_like(leaves["x"], dtype=torch.float32)
    wide = {name: x.double() for name, x in leaves.items()}
    results = (
        run(impl, leaves, index, cotangent, separate, **options),
        run("reference", wide, index, cotangent, **options),
        run("reference", leaves, index, cotangent, **options),
    )
    for result, truth, plain, name in zip(*results, ("y", *leaves), strict=True):
        oracle.assert_matches(result, truth, plain, name, roundings=roundings)


def written_out(leaves, index, gated):
    """One place of one token at a time."""
    x, weights, first, second, first_bias, second_bias = leaves.values()
    y = torch.zeros_like(x)
    for t in range(index.shape[0]):
        for k in range(index.shape[1]):
            e = index[t, k]
            if not 0 <= e < len(first):
                continue
            pre = first[e] @ x[t] + first_bias[e]
            gate, up = pre.chunk(2) if gated else (pre, torch.ones_like(pre))
            y[t] += weights[t, k] * (second[e] @ (F.silu(gate) * up) + second_bias[e])
    return y


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_the_sum_written_out(size, gated):
    leaves, index = make(size, torch.float64, gated)
    found = ops.experts(top_k_index=index, **leaves, gated=gated, impl="reference")
    torch.testing.assert_close(found, written_out(leaves, index, gated))


@pytest.mark.parametrize("gated", [True, False])
def test_reference_gradients(gated):
    leaves, index = make((5, 2, 3, 4, 3), torch.float64, gated)

    def call(*given):
        return ops.experts(top_k_index=index, **dict(zip(NAMES, given, strict=True)), gated=gated, impl="reference")

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves.values()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.triton
def test_triton_matches(size, dtype, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    for gated in (True, False):
        leaves, index = make(size, dtype, gated, kernel_device)
        assert_matches("triton", leaves, index, gated=gated)
    assert launched == 2 * LAUNCHES * (size[0] > 0)


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
@pytest.mark.usefixtures("filled_with_nan")
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_matches(size, instruction_set):
    with native.instruction_set(instruction_set):
        for gated in (True, False):
            assert_matches("native", *make(size, torch.float32, gated), gated=gated)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu_squared", "gelu", "gelu_tanh", "quick_gelu", "sigmoid", "tanh"])
def test_activations(activation, gated, impl):
    assert_matches(impl, *make((9, 2, 3, 16, 12), torch.float32, gated, bias=False), activation=activation, gated=gated)


@pytest.mark.parametrize("impl", BACKENDS)
@settings(deadline=None, max_examples=10)
@given(
    size=st.tuples(*[st.integers(1, most) for most in (40, 3, 6, 40, 40)]),
    gated=st.booleans(),
    bias=st.booleans(),
)
def test_any_size(impl, size, gated, bias):
    # Of one feature a gradient is one sum, of which cancellation may leave a tenth.
    leaves, index = make(size, torch.float32, gated, bias=bias)
    assert_matches(impl, leaves, index, roundings=10 * oracle.ROUNDINGS, gated=gated)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("gated", [True, False])
def test_separate_tensors_give_the_same_bits(gated, impl):
    leaves, index = make((37, 3, 5, 48, 33), torch.float32, gated)
    cotangent = torch.randn_like(leaves["x"])
    one, other = (run(impl, leaves, index, cotangent, separate, gated=gated) for separate in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_separate_tensor_changed_in_place_is_read_where_it_lies(impl):
    leaves, index = make((9, 2, 3, 16, 12), torch.float32, bias=False)
    first, second = (list(leaves[name].unbind()) for name in NAMES[2:4])
    routed = leaves["x"], index, leaves["top_k_weights"]
    ops.experts(*routed, first, second, impl=impl)
    first[0].mul_(2.0)
    expected = ops.experts(*routed, leaves["first_weight"], leaves["second_weight"], impl="reference")
    torch.testing.assert_close(ops.experts(*routed, first, second, impl=impl), expected)


@pytest.mark.parametrize("impl", BACKENDS)
def test_one_expert_may_learn_alone(impl):
    leaves, index = make((9, 2, 3, 16, 12), torch.float32, bias=False)

    def gradient(impl):
        first, second = (list(leaves[name].unbind()) for name in NAMES[2:4])
        second[2] = second[2].detach().requires_grad_()
        y = ops.experts(leaves["x"], index, leaves["top_k_weights"], first, second, impl=impl)
        return torch.autograd.grad(y.sin().sum(), second[2])[0]

    torch.testing.assert_close(gradient(impl), gradient("reference"))


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("learns", NAMES)
def test_any_tensor_may_learn_alone(impl, learns):
    leaves, index = make((9, 2, 3, 16, 12), torch.float32)

    def gradient(impl):
        given = {name: x.detach().requires_grad_(name == learns) for name, x in leaves.items()}
        y = ops.experts(top_k_index=index, **given, impl=impl)
        return torch.autograd.grad(y.square().sum(), given[learns])[0]

    torch.testing.assert_close(gradient(impl), gradient("reference"))


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_tokens_without_an_expert_reach_nothing(impl):
    leaves, index = make((9, 2, 3, 16, 12), torch.float32)
    index[4], index[5, 1] = -1, 3
    leaves["x"][4] = float("nan")
    leaves["top_k_weights"][4], leaves["top_k_weights"][5, 1] = float("inf"), float("nan")
    y, dx, dweights, *others = run(impl, leaves, index, torch.randn(9, 16))
    assert all((x == 0).all() for x in (y[4], dx[4], dweights[4], dweights[5, 1]))
    assert all(x.isfinite().all() for x in (y, dx, dweights, *others))


@pytest.mark.parametrize("impl", BACKENDS)
def test_all_tokens_of_one_expert_or_of_none(impl):
    for expert in (2, 7):
        leaves, index = make((70, 1, 4, 16, 12), torch.float32)
        assert_matches(impl, leaves, torch.full_like(index, expert))


@pytest.mark.parametrize("impl", BACKENDS)
def test_second_derivatives_are_the_references(impl):
    leaves, index = make((5, 2, 3, 6, 4), torch.float32)
    tensors = [x.requires_grad_() for x in leaves.values()]

    def second(impl):
        y = ops.experts(top_k_index=index, **leaves, impl=impl)
        first = torch.autograd.grad(y.sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), tensors)

    for found, expected in zip(second(impl), second("reference"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
@pytest.mark.parametrize("separate", [False, True])
def test_one_graph(impl, separate):
    leaves, index = make((5, 2, 3, 6, 4), torch.float32)
    tensors = [x.requires_grad_() for x in leaves.values()]

    def call(x, weights, first, second, first_bias, second_bias):
        if separate:
            first, second = list(first.unbind()), list(second.unbind())
        return ops.experts(x, index, weights, first, second, first_bias=first_bias, second_bias=second_bias, impl=impl)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(way(*tensors).square().sum(), tensors) for way in (compiled, call))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("namespace", ["tfm", pytest.param("tfm_native", marks=native.MARKS[:1])])
def test_operators_obey_torch(namespace):
    leaves, index = make((5, 2, 3, 6, 4), torch.float32)
    x, weights, first, second, first_bias, second_bias = leaves.values()
    operators = getattr(torch.ops, namespace)
    torch.library.opcheck(operators.experts_routing.default, (index, 3))
    routing = operators.experts_routing(torch.where(index < 0, 0, index.clamp(max=2)), 3)
    layer = [first], [second], first_bias, second_bias, "silu", True
    torch.library.opcheck(operators.experts.default, (x, *routing, weights, *layer, True))
    _, pre = operators.experts(x, *routing, weights, *layer, True)
    torch.library.opcheck(operators.experts_backward.default, (x, x, *routing, weights, pre, *layer, [True] * 6))


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
def test_threads_change_no_bit():
    leaves, index = make((150, 2, 6, 96, 130), torch.float32)
    cotangent = torch.randn_like(leaves["x"])
    one = run("native", leaves, index, cotangent)
    torch.set_num_threads(2)
    try:
        two = run("native", leaves, index, cotangent)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_separate_tensors_that_no_kernel_takes():
    x, index, weights = torch.randn(4, 6), torch.zeros(4, 1, dtype=torch.int64), torch.rand(4, 1)
    first, second = [torch.randn(4, 6)] * 2, [torch.randn(6, 4)] * 2
    for changes, reason in (
        ({"first_weight": [first[0], first[1].double()]}, "of one dtype"),
        ({"second_weight": [second[0], torch.randn(4, 6).t()]}, "contiguous"),
        ({"first_weight": first * MOST_SEPARATE, "second_weight": second * MOST_SEPARATE}, "at most"),
    ):
        given = {"first_weight": first, "second_weight": second} | changes
        ops.experts(x, index, weights, **given, gated=False)
        with pytest.raises(ValueError, match=reason):
            ops.experts(x, index, weights, **given, gated=False, impl="triton")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"x": torch.zeros(3)}),
        ("x", {"x": torch.zeros(5, 6, dtype=torch.int32)}),
        ("top_k_index", {"top_k_index": torch.zeros(4, 2, dtype=torch.int64)}),
        ("top_k_index", {"top_k_index": torch.zeros(5, 2)}),
        ("top_k_weights", {"top_k_weights": torch.zeros(5, 3)}),
        ("first_weight", {"first_weight": torch.zeros(3, 8, 5)}),
        ("first_weight", {"first_weight": torch.zeros(3, 7, 6)}),
        ("first_weight", {"first_weight": []}),
        ("first_weight", {"first_weight": [torch.zeros(8, 6), torch.zeros(9, 6)]}),
        ("second_weight", {"second_weight": torch.zeros(3, 5, 4)}),
        ("second_weight", {"second_weight": torch.zeros(2, 6, 4)}),
        ("first_bias", {"first_bias": torch.zeros(3, 4)}),
        ("second_bias", {"second_bias": torch.zeros(3, 8)}),
        ("activation", {"activation": "softmax"}),
        ("impl", {"impl": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    good = {
        "x": torch.zeros(5, 6), "top_k_index": torch.zeros(5, 2, dtype=torch.int64),
        "top_k_weights": torch.zeros(5, 2), "first_weight": torch.zeros(3, 8, 6),
        "second_weight": torch.zeros(3, 6, 4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        ops.experts(**good | changes)
