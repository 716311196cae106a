"""The native rotary embedding, out of place and in place, against the oracle."""

from __future__ import annotations

import native
import pytest
import rotary_cases as cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops

pytestmark = native.MARKS
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "columns"), [*cases.SIZES, (24, 12), (128, 64)])
def test_native_matches(dim, columns, interleaved, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        cases.assert_matches_at("native", dim, columns, interleaved, dtype, CPU)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 70),
    heads=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    half=st.integers(0, 40),
    rest=st.integers(0, 9),
    interleaved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_native_matches_packed(tokens, heads, half, rest, interleaved, dtype):
    cases.assert_matches_packed("native", tokens, heads, half, rest, interleaved, CPU, dtype)


@pytest.mark.parametrize("shape", cases.BROADCAST, ids=str)
def test_angles_broadcast(shape):
    cases.assert_angles_broadcast("native", shape, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", cases.VIEWS)
def test_strides_change_nothing(view, dtype):
    cases.assert_strides_change_nothing("native", view, CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", [None, *cases.OWN_ADDRESSES])
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_turns_the_first_heads(view, interleaved, dtype):
    cases.assert_in_place_turns_the_first_heads("native", view, interleaved, CPU, dtype)


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("columns", [1, 7, 12, 16, 23, 33, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_is_out_of_place(interleaved, columns, instruction_set):
    x, (cos, sin) = torch.randn(3, 20, 2 * columns + 1), torch.randn(2, 3, columns)
    with native.instruction_set(instruction_set):
        expected, _ = ops.rotary(x, None, cos, sin, interleaved=interleaved, impl="native")
        ops.rotary_(x, 20, cos, sin, interleaved=interleaved, impl="native")
    assert torch.equal(x, expected)


def test_autograd_knows_what_is_overwritten():
    cases.assert_autograd_knows_what_is_overwritten("native", CPU)


def test_forward_mode_is_refused():
    cases.assert_forward_mode_is_refused("native", CPU)


def test_heads_that_are_not_turned_pass_infinities():
    cases.assert_heads_that_are_not_turned_pass_infinities("native", CPU)


@pytest.mark.parametrize("wanted", ["query", "key"])
def test_only_wanted_gradients_are_computed(wanted):
    cases.assert_only_wanted_gradients_are_computed("native", wanted, CPU)


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (2, 3, 5, 0), (0, 3, 8)], ids=str)
def test_nothing_to_turn(shape):
    x, (cos, sin) = torch.randn(shape), torch.randn(2, shape[0 if len(shape) == 3 else 2], shape[-1] // 2)
    assert ops.rotary(x, x, cos, sin, impl="native")[1].shape == shape
    assert ops.rotary_(x, shape[1], cos, sin, impl="native") is x


@pytest.mark.parametrize("interleaved", [False, True])
def test_same_bits_on_any_number_of_threads(interleaved):
    query, key = (torch.randn(3, heads, 300, 70, requires_grad=True) for heads in (6, 2))
    cos, sin, cotangents = *torch.randn(2, 300, 33), [torch.randn_like(t) for t in (query, key)]
    native.assert_same_bits(lambda: cases.run("native", query, key, cos, sin, None, cotangents, interleaved))
    native.assert_same_bits(lambda: [ops.rotary_(query.detach().clone(), 5, cos, sin, impl="native")])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_positions_outside_the_tables_are_refused(kind):
    x, tables = torch.randn(3, 2, 8), torch.randn(2, 5, 4)
    for position in (-1, 5):
        positions = torch.tensor([0, 1, position], dtype=kind)
        with pytest.raises(IndexError, match=rf"^positions: expected rows 0 to 4, got {position}, out of range"):
            ops.rotary(x, None, *tables, positions, impl="native")


def test_operators_obey_torch():
    cases.assert_operators_obey_torch("tfm_native", CPU)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    cases.assert_compiles_whole("native", backend, CPU)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64], ids=str)
def test_the_reference_serves_tables_that_no_native_kernel_reads(kind):
    x, tables = torch.randn(5, 3, 8), torch.randn(2, 5, 4).to(kind)
    expected, _ = ops.rotary(x, None, *tables, impl="reference")
    assert torch.equal(ops.rotary(x, None, *tables)[0], expected)
    for operation in (ops.rotary_, lambda x, _, *tables, **options: ops.rotary(x, None, *tables, **options)):
        with pytest.raises(ValueError, match=r"native.*expected one of float32, bfloat16, got float"):
            operation(x, 2, *tables, impl="native")


def test_native_is_what_cpus_take():
    x, tables = torch.randn(5, 3, 8), torch.randn(2, 5, 4)
    expected, _ = ops.rotary(x, None, *tables, impl="native")
    assert torch.equal(ops.rotary(x, None, *tables)[0], expected)
    assert torch.equal(ops.rotary_(x.clone(), 3, *tables), expected)
