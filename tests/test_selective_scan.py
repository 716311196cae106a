"""Mamba's selective scan: the reference against the equations written out, the kernels against the oracle, pieces."""

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
NAMES = (
    "y", "final_state", "dx", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial_state",
)  # fmt: skip
# Where the optional ones stand among the arguments.
D, Z, BIAS, STATE = 5, 6, 7, 8
# Batch, steps, channels, numbers of a state: none of any, one, what is left of blocks, a sequence cut into chunks.
SIZES = [
    (2, 0, 3, 4),
    (0, 5, 3, 4),
    (1, 1, 1, 1),
    (2, 3, 5, 16),
    (3, 37, 17, 16),
    (2, 16, 70, 3),
    (1, 50, 9, 33),
    (2, 200, 3, 2),
]
# A state takes what each step rounds along to all that follow, by luck more or less than plain torch's does.
ROUNDINGS = 4 * oracle.ROUNDINGS
VIEWS = {
    "steps side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one sequence for all": lambda x: x[:1].expand(x.shape),
}


def make(size, dtype, device="cpu", weights=torch.float32):
    """Everything, in the order of the arguments: A as Mamba begins with it, steps from 0.001 to 1 and beyond."""
    batch, steps, channels, states = size

    def new(*shape):
        return torch.randn(shape, device=device)

    A = -torch.arange(1.0, states + 1, device=device) * (0.5 + torch.rand(channels, 1, device=device))
    tokens = [new(batch, steps, channels).to(dtype) for _ in range(3)]
    B, C = (new(batch, steps, states).to(dtype) for _ in range(2))
    D, bias = new(channels).to(weights), (new(channels) - 2).to(weights)
    return [*tokens[:2], A.to(weights), B, C, D, tokens[2], bias, new(batch, channels, states)]


def without(tensors, *places):
    return [None if place in places else x for place, x in enumerate(tensors)]


def call(impl, x, delta, A, B, C, D, z, bias, state, **options):
    return ops.selective_scan(
        x, delta, A, B, C, D=D, z=z, delta_bias=bias, initial_state=state, impl=impl, **options
    )  # fmt: skip


def run(impl, tensors, cotangents):
    """y, the final state and all gradients; None for what is absent."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    outputs = call(impl, *leaves, return_final_state=True)
    # The state after no step, of none before, is a constant of the reference.
    learned = [(x, c.to(x.dtype)) for x, c in zip(outputs, cotangents, strict=True) if x.requires_grad]
    learning = [x for x in leaves if x is not None]
    results, given = zip(*learned, strict=True)
    grads = iter(torch.autograd.grad(results, learning, given))
    return [*(output.detach() for output in outputs), *(None if x is None else next(grads) for x in leaves)]


def assert_matches(impl, tensors, roundings=ROUNDINGS):
    x, A = tensors[0], tensors[2]
    cotangents = [torch.randn_like(x, dtype=torch.float32), torch.randn(len(x), *A.shape, device=x.device)]
    results = (
        run(impl, tensors, cotangents),
        run("reference", [None if t is None else t.double() for t in tensors], cotangents),
        run("reference", tensors, cotangents),
    )
    for result, truth, plain, name in zip(*results, NAMES, strict=True):
        if truth is not None:
            oracle.assert_matches(result, truth, plain, name, roundings=roundings)


def written_out(x, delta, A, B, C, D, z, bias, state):
    """The equations of section 3.2 for one number of one channel at a time."""
    batch, steps, channels = x.shape
    step_size = torch.log1p(torch.exp(delta + bias))
    y, state = torch.empty_like(x), state.clone()
    for b in range(batch):
        for t in range(steps):
            for d in range(channels):
                size = step_size[b, t, d]
                state[b, d] = torch.exp(size * A[d]) * state[b, d] + size * B[b, t] * x[b, t, d]
                seen = torch.dot(C[b, t], state[b, d]) + D[d] * x[b, t, d]
                y[b, t, d] = seen * z[b, t, d] / (1 + torch.exp(-z[b, t, d]))
    return y, state


@pytest.mark.parametrize("size", [(2, 0, 3, 4), (1, 1, 1, 1), (2, 4, 5, 3)], ids=str)
def test_reference_is_the_equations_written_out(size):
    tensors = [x.double() for x in make(size, torch.float64)]
    found = call("reference", *tensors, return_final_state=True)
    torch.testing.assert_close(found, written_out(*tensors))
    bare = without(tensors, D, Z, BIAS, STATE)
    zeros = [torch.zeros_like(x) for x in tensors]
    open_gate = torch.full_like(tensors[Z], 60.0)
    expected = written_out(*tensors[:D], zeros[D], open_gate, zeros[BIAS], zeros[STATE])[0] / 60
    torch.testing.assert_close(call("reference", *bare), expected)


def test_reference_gradients():
    leaves = [x.double().requires_grad_() for x in make((2, 3, 2, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *given: call("reference", *given, return_final_state=True), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.triton
def test_triton_matches(size, dtype, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    tensors = make(size, dtype, kernel_device)
    assert_matches("triton", tensors)
    assert_matches("triton", without(tensors, D, Z, BIAS, STATE))
    assert ("selective_scan_forward_kernel" in launched) == (size[0] > 0)


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
@pytest.mark.usefixtures("filled_with_nan")
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_matches(size, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        tensors = make(size, dtype)
        assert_matches("native", tensors)
        assert_matches("native", without(tensors, D, Z, BIAS, STATE))
        assert_matches("native", make(size, dtype, weights=dtype))


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_nothing(view, impl):
    tensors = make((2, 9, 33, 4), torch.float32)
    for place in (0, 1, 3, 4, Z):
        given = [*tensors]
        given[place] = VIEWS[view](given[place])
        assert_matches(impl, given)


@pytest.mark.parametrize("impl", BACKENDS)
@settings(deadline=None, max_examples=8)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(0, 20), st.integers(1, 40), st.integers(1, 20)),
    absent=st.sets(st.sampled_from([D, Z, BIAS, STATE])),
)
def test_any_size(impl, size, absent):
    # Of one channel a gradient is one sum, of which cancellation may leave a tenth.
    assert_matches(impl, without(make(size, torch.float32), *absent), roundings=10 * oracle.ROUNDINGS)


@pytest.mark.parametrize("impl", BACKENDS)
def test_extreme_steps(impl):
    """States that nothing leaves and states that are gone at once, and gates wide open or shut."""
    x, delta, A, B, C, skip, z, bias, state = make((2, 20, 5, 4), torch.float32)
    assert_matches(impl, [x, 30 * delta, A, B, C, skip, z, bias, state])
    assert_matches(impl, [x, delta - 40, A, B, C, skip, z, bias, state])
    assert_matches(impl, [x, delta, 100 * A, B, C, skip, 50 * z, bias, state])
    assert_matches(impl, [x, delta, 1e-4 * A, B, C, skip, z, bias, state])


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
@pytest.mark.parametrize("has_state", [True, False])
def test_pieces_are_the_whole(impl, has_state):
    """As decoding has it: a step at a time, the state handed on."""
    x, delta, A, B, C, skip, z, bias, state = make((2, 37, 7, 5), torch.float32)
    options, state = {"return_final_state": True}, state if has_state else None
    whole, last = call(impl, x, delta, A, B, C, skip, z, bias, state, **options)
    pieces, cuts = [], [tokens.split([1, 2, 20, 1, 1, 12], dim=1) for tokens in (x, delta, B, C, z)]
    for x, delta, B, C, z in zip(*cuts, strict=True):
        y, state = call(impl, x, delta, A, B, C, skip, z, bias, state, **options)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("learns", range(9))
def test_any_tensor_may_learn_alone(impl, learns):
    tensors = make((2, 5, 6, 3), torch.float32)

    def gradient(impl):
        leaves = [x.detach().requires_grad_(place == learns) for place, x in enumerate(tensors)]
        return torch.autograd.grad(call(impl, *leaves).square().sum(), leaves[learns])[0]

    torch.testing.assert_close(gradient(impl), gradient("reference"))


@pytest.mark.parametrize("impl", BACKENDS)
def test_second_derivatives_are_the_references(impl):
    leaves = [x.requires_grad_() for x in make((2, 5, 6, 3), torch.float32)]

    def second(impl):
        first = torch.autograd.grad(call(impl, *leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    for found, expected in zip(second(impl), second("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", BACKENDS)
def test_one_graph(impl):
    leaves = [x.requires_grad_() for x in make((2, 5, 6, 3), torch.float32)]

    def function(*given):
        return call(impl, *given)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(way(*leaves).square().sum(), leaves) for way in (compiled, function))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("namespace", ["tfm", pytest.param("tfm_native", marks=native.MARKS[:1])])
def test_operators_obey_torch(namespace):
    *given, state = make((2, 40, 6, 3), torch.float32)
    operators = getattr(torch.ops, namespace)
    for kept_every in (0, 16):
        torch.library.opcheck(operators.selective_scan.default, (*given, state, kept_every))
    kept = operators.selective_scan(*given, state, 16)[2]
    cotangents = (torch.randn_like(given[0]), torch.randn_like(state))
    torch.library.opcheck(operators.selective_scan_backward.default, (*cotangents, *given, kept, 16))


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
def test_threads_change_no_bit():
    tensors = make((3, 200, 70, 16), torch.float32)
    cotangents = [torch.randn_like(tensors[0]), torch.randn_like(tensors[STATE])]
    native.assert_same_bits(lambda: run("native", tensors, cotangents))


def test_a_state_of_many_numbers_is_the_references():
    tensors = make((1, 3, 2, 65), torch.float32)
    torch.testing.assert_close(call("auto", *tensors), call("reference", *tensors), rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected a state of at most 64 numbers, got 65"):
        call("native", *tensors)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"x": torch.zeros(3, 4)}),
        (
            "x",
            dict.fromkeys(("x", "delta", "z"), torch.zeros(2, 4, 3, dtype=torch.int32))
            | dict.fromkeys("BC", torch.zeros(2, 4, 4, dtype=torch.int32)),
        ),
        ("delta", {"delta": torch.zeros(2, 4, 1)}),
        ("z", {"z": torch.zeros(2, 4, 3, dtype=torch.float64)}),
        ("A", {"A": torch.zeros(3)}),
        ("A", {"A": torch.zeros(3, 0)}),
        ("B", {"B": torch.zeros(2, 4, 6)}),
        ("C", {"C": torch.zeros(2, 5, 4)}),
        ("D", {"D": torch.zeros(1, 3)}),
        ("delta_bias", {"delta_bias": torch.zeros(4)}),
        ("initial_state", {"initial_state": torch.zeros(2, 4, 3)}),
        ("impl", {"impl": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    good = dict.fromkeys(("x", "delta", "z"), torch.zeros(2, 4, 3)) | {"A": torch.zeros(3, 4)}
    good |= dict.fromkeys(("B", "C"), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        ops.selective_scan(**good | changes)
