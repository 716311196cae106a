"""WKV: the reference against the sums written out, the kernels against the oracle, pieces and whole."""

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
NAMES = ("y", "final_state", "ddecay", "dfirst", "dkey", "dvalue", "dinitial_state")
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
    """decay, first, key, value, and a state of the kind that another call leaves."""
    batch, steps, channels = size
    decay, first = (torch.randn(channels, device=device).to(weights) for _ in range(2))
    key, value = (torch.randn(batch, steps, channels, device=device).to(dtype) for _ in range(2))
    state = torch.randn(3, batch, channels, device=device)
    state[1] = 1 + state[1].abs()
    return [decay, first, key, value, state]


def run(impl, tensors, cotangents, through_state=True):
    """y, the final state and all gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y, final_state = ops.wkv(*leaves[:4], initial_state=leaves[4], return_final_state=True, impl=impl)
    outputs = (y, final_state) if through_state else (y,)
    given = [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=False)]
    # What has no step has no part in the reference's result.
    grads = torch.autograd.grad(outputs, leaves, given, allow_unused=True, materialize_grads=True)
    return [y.detach(), final_state.detach(), *grads]


def assert_matches(impl, tensors, roundings=ROUNDINGS, **options):
    cotangents = [torch.randn_like(t, dtype=torch.float32) for t in tensors[3:]]
    results = (
        run(impl, tensors, cotangents, **options),
        run("reference", [t.double() for t in tensors], cotangents, **options),
        run("reference", tensors, cotangents, **options),
    )
    for result, truth, plain, name in zip(*results, NAMES, strict=True):
        oracle.assert_matches(result, truth, plain, name, roundings=roundings)


def written_out(decay, first, key, value):
    """Equation 16, its sums from the first step on at each step."""
    y = torch.empty_like(value)
    for t in range(key.shape[1]):
        age = torch.arange(t - 1, -2, -1.0, dtype=key.dtype)
        weights = key[:, : t + 1] - age[:, None] * decay.exp()
        weights[:, t] = first + key[:, t]
        weights = weights.exp()
        y[:, t] = (weights * value[:, : t + 1]).sum(1) / weights.sum(1)
    return y


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_the_sums_written_out(size):
    *given, _ = make(size, torch.float64, weights=torch.float64)
    torch.testing.assert_close(ops.wkv(*given, impl="reference"), written_out(*given))


def test_a_state_is_the_sums_before():
    """Whatever its maximum."""
    decay, first, key, value, _ = make((2, 9, 5), torch.float64, weights=torch.float64)
    whole = ops.wkv(decay, first, key, value)
    weights = (key[:, :4] - torch.arange(3, -1, -1.0)[:, None] * decay.exp()).exp()
    sums = (weights * value[:, :4]).sum(1), weights.sum(1)
    for maximum in (0.0, 7.0, -3.0):
        scale = torch.full_like(sums[0], maximum)
        state = torch.stack((*(x * (-scale).exp() for x in sums), scale))
        rest = ops.wkv(decay, first, key[:, 4:], value[:, 4:], initial_state=state)
        torch.testing.assert_close(rest, whole[:, 4:])


def test_reference_gradients():
    leaves = [x.double().requires_grad_() for x in make((2, 4, 3), torch.float64)]

    def call(*given):
        return ops.wkv(*given[:4], initial_state=given[4], return_final_state=True, impl="reference")

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.triton
def test_triton_matches(size, dtype, kernel_device, monkeypatch):
    launched = launches.watch(monkeypatch)
    for through_state in (True, False):
        assert_matches("triton", make(size, dtype, kernel_device), through_state=through_state)
    assert launched == 2 * ["wkv_forward_kernel", "wkv_backward_kernel", "sum_partials_kernel"] * (size[0] > 0)


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
@pytest.mark.usefixtures("filled_with_nan")
@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_matches(size, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        for through_state in (True, False):
            assert_matches("native", make(size, dtype), through_state=through_state)
        assert_matches("native", make(size, dtype, weights=dtype))


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_change_nothing(view, impl):
    decay, first, key, value, state = make((2, 9, 33), torch.float32)
    assert_matches(impl, [decay, first, VIEWS[view](key), value, state])
    assert_matches(impl, [decay, first, key, VIEWS[view](value), state])
    assert_matches(impl, [decay, first, key, value, state.transpose(0, 2).contiguous().transpose(0, 2)])


@pytest.mark.parametrize("impl", BACKENDS)
@settings(deadline=None, max_examples=8)
@given(size=st.tuples(st.integers(1, 3), st.integers(0, 20), st.integers(1, 40)))
def test_any_size(impl, size):
    # Of one channel a gradient is one sum, of which cancellation may leave a tenth.
    assert_matches(impl, make(size, torch.float32), roundings=10 * oracle.ROUNDINGS)


@pytest.mark.parametrize("impl", BACKENDS)
def test_huge_keys(impl):
    """No exponential overflows, whatever the keys; and what is far behind has no weight left, but no NaN either."""
    decay, first, key, value, state = make((2, 20, 5), torch.float32)
    assert_matches(impl, [decay, first, 1e4 * key, value, state], through_state=False)
    assert_matches(impl, [decay + 5, first, key - 1e5, value, state], through_state=False)


@pytest.mark.parametrize("impl", ["reference", *BACKENDS])
@pytest.mark.parametrize("has_state", [True, False])
def test_pieces_are_the_whole(impl, has_state):
    """As decoding has it: a step at a time, the state handed on."""
    *given, state = make((2, 27, 7), torch.float32)
    state = state if has_state else None
    whole, last = ops.wkv(*given, initial_state=state, return_final_state=True, impl=impl)
    pieces = []
    for key, value in zip(*(x.split([1, 2, 20, 1, 1, 2], dim=1) for x in given[2:]), strict=True):
        y, state = ops.wkv(*given[:2], key, value, initial_state=state, return_final_state=True, impl=impl)
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
        y = ops.wkv(*given[:4], initial_state=given[4], impl=impl)
        return torch.autograd.grad(y.square().sum(), given[learns])[0]

    torch.testing.assert_close(gradient(impl), gradient("reference"))


@pytest.mark.parametrize("impl", BACKENDS)
def test_second_derivatives_are_the_references(impl):
    leaves = [x.requires_grad_() for x in make((2, 5, 6), torch.float32)]

    def second(impl):
        y = ops.wkv(*leaves[:4], initial_state=leaves[4], impl=impl)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    for found, expected in zip(second(impl), second("reference"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", BACKENDS)
def test_one_graph(impl):
    leaves = [x.requires_grad_() for x in make((2, 5, 6), torch.float32)]

    def call(*given):
        return ops.wkv(*given[:4], initial_state=given[4], impl=impl)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(way(*leaves).square().sum(), leaves) for way in (compiled, call))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("namespace", ["tfm", pytest.param("tfm_native", marks=native.MARKS[:1])])
def test_operators_obey_torch(namespace):
    decay, first, key, value, state = make((2, 20, 6), torch.float32)
    operators = getattr(torch.ops, namespace)
    given = (decay, first, key, value)
    for kept_every in (0, 8):
        torch.library.opcheck(operators.wkv.default, (*given, state, kept_every))
    kept = operators.wkv(*given, state, 8)[2]
    cotangents = (torch.randn_like(key), torch.randn_like(state))
    torch.library.opcheck(operators.wkv_backward.default, (*cotangents, *given, kept, 8))


@pytest.mark.skipif(bool(native.WHY_UNAVAILABLE), reason=native.WHY_UNAVAILABLE)
def test_threads_change_no_bit():
    tensors = make((3, 200, 70), torch.float32)
    cotangents = [torch.randn_like(tensors[3]), torch.randn_like(tensors[4])]
    native.assert_same_bits(lambda: run("native", tensors, cotangents))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("key", {"key": torch.zeros(3, 4)}),
        ("key", {"key": torch.zeros(2, 4, 3, dtype=torch.int32), "value": torch.zeros(2, 4, 3, dtype=torch.int32)}),
        ("value", {"value": torch.zeros(2, 4, 1)}),
        ("value", {"value": torch.zeros(2, 4, 3, dtype=torch.float64)}),
        ("decay", {"decay": torch.zeros(1, 3)}),
        ("first", {"first": torch.zeros(4)}),
        ("initial_state", {"initial_state": torch.zeros(2, 2, 3)}),
        ("impl", {"impl": "cuda"}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    good = {
        "decay": torch.zeros(3), "first": torch.zeros(3), "key": torch.zeros(2, 4, 3), "value": torch.zeros(2, 4, 3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        ops.wkv(**good | changes)
