"""RG-LRU: the reference against equations 1 to 4 written out, the kernels against the oracle, pieces and whole."""

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
    "y", "final_state", "dx", "dinput_gate", "drecurrence_gate", "drecurrent_param", "dinitial_state",
)  # fmt: skip
# Batch, steps, channels: none of any, one, what is left of chunks and of blocks of channels.
SIZES = [(2, 0, 3), (0, 5, 3), (1, 1, 1), (2, 3, 5), (3, 33, 17), (2, 16, 70), (1, 50, 9)]
# A state takes what each step rounds along to all that follow, by luck more or less than plain torch's does.
ROUNDINGS = 4 * oracle.ROUNDINGS
VIEWS = {
    "steps side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one sequence for all": lambda x: x[:1].expand(x.shape),
}


def make(size, dtype, device="cpu", weights=torch.float32):
    """x, both gates, a parameter as RecurrentGemma draws it and beyond, and a state."""
    batch, _, channels = size
    tokens = [torch.randn(size, device=device).to(dtype) for _ in range(3)]
    param = (2 * torch.randn(channels, device=device) - 3).to(weights)
    return [*tokens, param, torch.randn(batch, channels, device=device)]


def resets(size, device="cpu"):
    """The first step of some sequences, and one in eight."""
    return torch.rand(size[:2], device=device) < 0.125


def run(impl, tensors, reset, cotangents):
    """y, the final state and all gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    options = {"reset": reset, "initial_state": leaves[4], "return_final_state": True, "impl": impl}
    outputs = ops.rg_lru(*leaves[:4], **options)
    given = [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, leaves, given)
    return [*(output.detach() for output in outputs), *grads]


def assert_matches(impl, tensors, reset, roundings=ROUNDINGS):
    cotangents = [torch.randn_like(tensors[place], dtype=torch.float32) for place in (0, 4)]
    results = (
        run(impl, tensors, reset, cotangents),
        run("reference", [t.double() for t in tensors], reset, cotangents),
        run("reference", tensors, reset, cotangents),
    )
    for result, truth, plain, name in zip(*results, NAMES, strict=True):
        oracle.assert_matches(result, truth, plain, name, roundings=roundings)


def written_out(x, input_gate, recurrence_gate, recurrent_param, reset, state):
    """Equations 1 to 4, each as it stands."""
    base = torch.sigmoid(-recurrent_param)
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        a = base ** (8 * torch.sigmoid(recurrence_gate[:, t]))
        scale = torch.sqrt(1 - a**2)
        fresh = reset[:, t, None]
        state = torch.where(fresh, 0.0, a * state)
        state = state + torch.where(fresh, 1.0, scale) * torch.sigmoid(input_gate[:, t]) * x[:, t]
        y[:, t] = state
    return y, state


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_the_equations_written_out(size):
    *given, state = make(size, torch.float64, weights=torch.float64)
    for reset in (resets(size), torch.zeros(size[:2], dtype=torch.bool)):
        options = {"initial_state": state, "return_final_state": True, "impl": "reference"}
        expected = written_out(*given, reset, state.double())
        torch.testing.assert_close(ops.rg_lru(*given, reset=reset, **options), expected)
    torch.testing.assert_close(ops.rg_lru(*given, **options), expected)
    without = ops.rg_lru(*given, impl="reference")
    torch.testing.assert_close(without, written_out(*given, reset, torch.zeros_like(state).double())[0])


def test_reference_gradients():
    leaves = [x.double().requires_grad_() for x in make((2, 4, 3), torch.float64)]
    reset = torch.tensor([[False, False, True, False], [True, False, False, False]])

    def call(*given):
        return ops.rg_lru(*given[:4], reset=reset, initial_state=given[4], return_final_state=True, impl="reference")

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_the_root_is_no_steeper_than_a_thousand(impl):
    """Where a is 1, a gradient without bound would be no number."""
    x, input_gate, recurrence_gate, param, _ = make((1, 1, 4), torch.float32)
    recurrence_gate = torch.tensor([-200.0, -30.0, -14.0, -3.0]).view(1, 1, 4).requires_grad_()
    y = ops.rg_lru(x, input_gate, recurrence_gate, param, impl=impl)
    (found,) = torch.autograd.grad(y.sum(), recurrence_gate)
    gate, rate = recurrence_gate.detach().double(), 8 * torch.nn.functional.softplus(param.double())
    square = (-2 * rate * gate.sigmoid()).exp()
    slope = (0.5 / (1 - square).sqrt()).clamp(max=1000.0)
    d_gate = rate * gate.sigmoid() * (1 - gate.sigmoid())
    expected = input_gate.double().sigmoid() * x.double() * 2 * square * slope * d_gate
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.triton
def test_triton_matches(size, dtype, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    for reset in (resets(size, kernel_device), None):
        assert_matches("triton", make(size, dtype, kernel_device), reset)
    assert launched == 2 * ["rg_lru_forward_kernel", "rg_lru_backward_kernel", "sum_partials_kernel"] * (size[0] > 0)


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
@pytest.mark.usefixtures("filled_with_nan")
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_matches(size, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        for reset in (resets(size), None):
            assert_matches("native", make(size, dtype), reset)
        assert_matches("native", make(size, dtype, weights=dtype), resets(size))


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_nothing(view, impl):
    tensors, reset = make((2, 9, 33), torch.float32), resets((2, 9))
    for place in range(3):
        given = [*tensors]
        given[place] = VIEWS[view](given[place])
        assert_matches(impl, given, reset)
    wide = reset[..., None].expand(*reset.shape, 2).contiguous()
    assert_matches(impl, tensors, VIEWS[view](wide)[..., 0])


@pytest.mark.parametrize("impl", BACKENDS)
@settings(deadline=None, max_examples=8)
@given(size=st.tuples(st.integers(1, 3), st.integers(0, 20), st.integers(1, 40)), has_resets=st.booleans())
def test_any_size(impl, size, has_resets):
    # Of one channel a gradient is one sum, of which cancellation may leave a tenth.
    reset = resets(size) if has_resets else None
    assert_matches(impl, make(size, torch.float32), reset, roundings=10 * oracle.ROUNDINGS)


@pytest.mark.parametrize("impl", BACKENDS)
def test_extreme_gates(impl):
    """Gates that are wide open or shut, and channels that keep nearly all or nothing."""
    x, input_gate, recurrence_gate, param, state = make((2, 20, 5), torch.float32)
    assert_matches(impl, [x, 100 * input_gate, 100 * recurrence_gate, param, state], None)
    assert_matches(impl, [x, input_gate, recurrence_gate, 10 * param, state], None)
    assert_matches(impl, [x, input_gate, recurrence_gate, param - 15, state], None)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
def test_nothing_passes_a_reset(impl):
    """What came before may be NaN: neither results nor gradients behind it know."""
    tensors = make((1, 12, 5), torch.float32)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, 7] = True
    behind = [x[:, 7:] for x in tensors[:3]]
    for x in tensors[:3]:
        x[:, :7] = float("nan")
    leaves = [x.requires_grad_() for x in tensors[:3]]
    y = ops.rg_lru(*leaves, tensors[3], reset=reset, impl=impl)[:, 7:]
    expected = ops.rg_lru(*behind, tensors[3], reset=reset[:, 7:], impl=impl)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
@pytest.mark.parametrize("has_state", [True, False])
def test_pieces_are_the_whole(impl, has_state):
    """As decoding has it: a step at a time, the state handed on."""
    *tokens, param, state = make((2, 27, 7), torch.float32)
    reset, state = resets((2, 27)), state if has_state else None
    options = {"return_final_state": True, "impl": impl}
    whole, last = ops.rg_lru(*tokens, param, reset=reset, initial_state=state, **options)
    pieces = []
    for *some, anew in zip(*(x.split([1, 2, 20, 1, 1, 2], dim=1) for x in (*tokens, reset)), strict=True):
        y, state = ops.rg_lru(*some, param, reset=anew, initial_state=state, **options)
        pieces.append(y)
    exact = {} if impl == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **exact)
    torch.testing.assert_close(state, last, **exact)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("learns", range(5))
def test_any_tensor_may_learn_alone(impl, learns):
    tensors = make((2, 5, 6), torch.float32)

    def gradient(impl):
        given = [x.detach().requires_grad_(place == learns) for place, x in enumerate(tensors)]
        y = ops.rg_lru(*given[:4], initial_state=given[4], impl=impl)
        return torch.autograd.grad(y.square().sum(), given[learns])[0]

    torch.testing.assert_close(gradient(impl), gradient("reference"))


@pytest.mark.parametrize("impl", BACKENDS)
def test_second_derivatives_are_the_references(impl):
    leaves, reset = [x.requires_grad_() for x in make((2, 5, 6), torch.float32)], resets((2, 5))

    def second(impl):
        y = ops.rg_lru(*leaves[:4], reset=reset, initial_state=leaves[4], impl=impl)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    for found, expected in zip(second(impl), second("reference"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", BACKENDS)
def test_one_graph(impl):
    leaves, reset = [x.requires_grad_() for x in make((2, 5, 6), torch.float32)], resets((2, 5))

    def call(*given):
        return ops.rg_lru(*given[:4], reset=reset, initial_state=given[4], impl=impl)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(way(*leaves).square().sum(), leaves) for way in (compiled, call))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("namespace", ["tfm", pytest.param("tfm_native", marks=native.MARKS[:1])])
def test_operators_obey_torch(namespace):
    *given, state = make((2, 20, 6), torch.float32)
    operators, reset = getattr(torch.ops, namespace), resets((2, 20))
    for kept_every in (0, 8):
        torch.library.opcheck(operators.rg_lru.default, (*given, reset, state, kept_every))
    kept = operators.rg_lru(*given, reset, state, 8)[2]
    cotangents = (torch.randn_like(given[0]), torch.randn_like(state))
    torch.library.opcheck(operators.rg_lru_backward.default, (*cotangents, *given, reset, kept, 8))


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
def test_threads_change_no_bit():
    tensors, reset = make((3, 200, 70), torch.float32), resets((3, 200))
    cotangents = [torch.randn_like(tensors[0]), torch.randn_like(tensors[4])]
    native.assert_same_bits(lambda: run("native", tensors, reset, cotangents))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"x": torch.zeros(3, 4)}),
        ("x", dict.fromkeys(("x", "input_gate", "recurrence_gate"), torch.zeros(2, 4, 3, dtype=torch.int32))),
        ("input_gate", {"input_gate": torch.zeros(2, 4, 1)}),
        ("recurrence_gate", {"recurrence_gate": torch.zeros(2, 4, 3, dtype=torch.float64)}),
        ("recurrent_param", {"recurrent_param": torch.zeros(1, 3)}),
        ("reset", {"reset": torch.zeros(2, 4)}),
        ("reset", {"reset": torch.zeros(1, 4, dtype=torch.bool)}),
        ("initial_state", {"initial_state": torch.zeros(2, 4)}),
        ("impl", {"impl": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    good = dict.fromkeys(("x", "input_gate", "recurrence_gate"), torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        ops.rg_lru(**good | {"recurrent_param": torch.zeros(3)} | changes)
