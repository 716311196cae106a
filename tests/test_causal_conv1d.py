"""The causal convolution: the reference against a sum written out, the kernels against the oracle, pieces and whole."""

from __future__ import annotations

import launches
import native
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES

from tfm import ops

BACKENDS = [
    pytest.param("triton", marks=pytest.mark.triton),
    pytest.param("native", marks=native.MARKS[:1]),
]
NAMES = ("y", "final_state", "dx", "dweight", "dbias", "dinitial_state")
# Batch, channels, steps: none of either, one, fewer steps than weights, rests of tiles.
SIZES = [(2, 3, 0), (0, 3, 5), (1, 1, 1), (2, 5, 2), (3, 17, 65), (2, 130, 19), (1, 9, 300)]
VIEWS = {
    "steps side by side": lambda x: x,
    "channels side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one sequence for all": lambda x: x[:1].expand(x.shape),
}


def make(size, width, dtype, device="cpu", weights=torch.float32):
    """x, weight, bias and the state before the first step."""
    batch, channels, steps = size
    shapes = ((batch, channels, steps), (channels, width), (channels,), (batch, channels, width - 1))
    types = (dtype, weights, weights, dtype)
    return [torch.randn(shape, device=device).to(kind) for shape, kind in zip(shapes, types, strict=True)]


def run(impl, tensors, activation, cotangents):
    """y, the final state and all gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    x, weight, bias, state = leaves
    outputs = ops.causal_conv1d(
        x, weight, bias, initial_state=state, activation=activation, return_final_state=True, impl=impl
    )
    grads = torch.autograd.grad(outputs, leaves, [c.to(x.dtype) for c in cotangents])
    return [*(output.detach() for output in outputs), *grads]


def assert_matches(impl, tensors, activation, roundings=oracle.ROUNDINGS):
    x, _, _, state = tensors
    cotangents = [torch.randn_like(t, dtype=torch.float32) for t in (x, state)]
    wide = [t.double() for t in tensors]
    results = (
        run(impl, tensors, activation, cotangents),
        run("reference", wide, activation, cotangents),
        run("reference", tensors, activation, cotangents),
    )
    for result, truth, plain, name in zip(*results, NAMES, strict=True):
        oracle.assert_matches(result, truth, plain, name, roundings=roundings)


def written_out(x, weight, bias, state):
    """One step of one channel at a time."""
    whole = torch.cat((state, x), dim=2)
    y = torch.empty_like(x)
    for t in range(x.shape[2]):
        window = whole[:, :, t : t + weight.shape[1]]
        y[:, :, t] = (window * weight).sum(-1) + bias
    return y, whole[:, :, x.shape[2] :]


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_the_sum_written_out(size, width):
    tensors = make(size, width, torch.float64, weights=torch.float64)
    x, weight, bias, state = tensors
    found = ops.causal_conv1d(x, weight, bias, initial_state=state, return_final_state=True, impl="reference")
    for result, expected in zip(found, written_out(*tensors), strict=True):
        torch.testing.assert_close(result, expected)
    smooth = ops.causal_conv1d(x, weight, bias, initial_state=state, activation="silu", impl="reference")
    torch.testing.assert_close(smooth, torch.nn.functional.silu(found[0]))
    plain = ops.causal_conv1d(x, weight, impl="reference")
    torch.testing.assert_close(plain, written_out(x, weight, torch.zeros_like(bias), torch.zeros_like(state))[0])


@pytest.mark.parametrize("activation", ["silu", None])
def test_reference_gradients(activation):
    leaves = [x.requires_grad_() for x in make((2, 3, 5), 4, torch.float64, weights=torch.float64)]

    def call(x, weight, bias, state):
        return ops.causal_conv1d(
            x, weight, bias, initial_state=state, activation=activation, return_final_state=True, impl="reference"
        )

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.triton
def test_triton_matches(size, width, dtype, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    for activation in ("silu", None):
        assert_matches("triton", make(size, width, dtype, kernel_device), activation)
    ways = ["causal_conv1d_forward_kernel", "causal_conv1d_backward_kernel", "sum_partials_kernel"]
    assert launched == 2 * ways * (size[0] > 0)


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
@pytest.mark.usefixtures("filled_with_nan")
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_matches(size, width, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        for activation in ("silu", None):
            assert_matches("native", make(size, width, dtype), activation)
        assert_matches("native", make(size, width, dtype, weights=dtype), "silu")


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_nothing(view, impl):
    x, *others = make((3, 20, 33), 4, torch.float32)
    assert_matches(impl, [VIEWS[view](x), *others], "silu")


@pytest.mark.parametrize("impl", BACKENDS)
@settings(deadline=None, max_examples=15)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(0, 40)),
    width=st.integers(2, 4),
    activation=st.sampled_from(["silu", None]),
)
def test_any_size(impl, size, width, activation):
    # Of one channel a gradient is one sum, of which cancellation may leave a tenth.
    assert_matches(impl, make(size, width, torch.float32), activation, roundings=10 * oracle.ROUNDINGS)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
@pytest.mark.parametrize("has_state", [True, False])
def test_pieces_are_the_whole(impl, has_state):
    """As decoding has it: a step at a time, the state handed on."""
    x, weight, bias, state = make((2, 7, 11), 4, torch.float32)
    state = state if has_state else None
    options = {"activation": "silu", "return_final_state": True, "impl": impl}
    whole, last = ops.causal_conv1d(x, weight, bias, initial_state=state, **options)
    pieces = []
    for piece in x.split([1, 2, 5, 1, 1, 1], dim=2):
        y, state = ops.causal_conv1d(piece, weight, bias, initial_state=state, **options)
        pieces.append(y)
    # torch's own SiLU depends on where in a vector a number stands.
    exact = {} if impl == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, **exact)
    assert torch.equal(state, last)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("learns", range(4))
def test_any_tensor_may_learn_alone(impl, learns):
    tensors = make((2, 5, 6), 3, torch.float32)

    def gradient(impl):
        given = [x.detach().requires_grad_(place == learns) for place, x in enumerate(tensors)]
        y = ops.causal_conv1d(*given[:3], initial_state=given[3], activation="silu", impl=impl)
        return torch.autograd.grad(y.square().sum(), given[learns])[0]

    torch.testing.assert_close(gradient(impl), gradient("reference"))


@pytest.mark.parametrize("impl", BACKENDS)
def test_second_derivatives_are_the_references(impl):
    leaves = [x.requires_grad_() for x in make((2, 5, 6), 3, torch.float32)]

    def second(impl):
        x, weight, bias, state = leaves
        y = ops.causal_conv1d(x, weight, bias, initial_state=state, activation="silu", impl=impl)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    for found, expected in zip(second(impl), second("reference"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", BACKENDS)
def test_one_graph(impl):
    leaves = [x.requires_grad_() for x in make((2, 5, 6), 3, torch.float32)]

    def call(x, weight, bias, state):
        return ops.causal_conv1d(x, weight, bias, initial_state=state, activation="silu", impl=impl)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(way(*leaves).square().sum(), leaves) for way in (compiled, call))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("namespace", ["tfm", pytest.param("tfm_native", marks=native.MARKS[:1])])
def test_operators_obey_torch(namespace):
    x, weight, bias, state = make((2, 5, 6), 3, torch.float32)
    operators = getattr(torch.ops, namespace)
    torch.library.opcheck(operators.causal_conv1d.default, (x, weight, bias, state, True))
    given = (torch.randn_like(x), torch.randn_like(state), x, weight, bias, state, True)
    torch.library.opcheck(operators.causal_conv1d_backward.default, given)


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
def test_threads_change_no_bit():
    tensors = make((3, 70, 200), 4, torch.float32)
    cotangents = [torch.randn_like(tensors[0]), torch.randn_like(tensors[3])]
    one = run("native", tensors, "silu", cotangents)
    torch.set_num_threads(2)
    try:
        two = run("native", tensors, "silu", cotangents)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"x": torch.zeros(3, 4)}),
        ("x", {"x": torch.zeros(2, 3, 4, dtype=torch.int32)}),
        ("weight", {"weight": torch.zeros(3, 5)}),
        ("weight", {"weight": torch.zeros(4, 3)}),
        ("bias", {"bias": torch.zeros(4)}),
        ("initial_state", {"initial_state": torch.zeros(2, 3, 3)}),
        ("activation", {"activation": "gelu"}),
        ("impl", {"impl": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    good = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        ops.causal_conv1d(**good | changes)
