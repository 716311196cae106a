"""The native attention over a cache for CPUs against the oracle."""

from __future__ import annotations

import native
import pytest
import torch
from decode_attention_cases import (
    CPU,
    PROBLEMS,
    Problem,
    as_views,
    assert_matches,
    assert_more_capacity_gives_the_same_bits,
    assert_reordering_the_table_is_reordering_the_cache,
    make,
    to,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tfm import ops

pytestmark = native.MARKS
DTYPES = [torch.float32, torch.bfloat16]
# Besides the common ones: every number of vectors at once, and a rest; head dims above what Triton takes.
WIDE = {
    "wide": Problem([20, 1], (20, 2, 2, 130, 257)),
    "whole vectors": Problem([33, 16], (40, 2, 1, 64, 112)),
}


@pytest.mark.parametrize("instruction_set", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", (PROBLEMS | WIDE).values(), ids=(PROBLEMS | WIDE).keys())
def test_native_matches(problem, dtype, instruction_set):
    with native.instruction_set(instruction_set):
        output = assert_matches(make(problem, CPU, dtype), "native")
    assert (output[torch.tensor(problem.lengths) == 0] == 0).all()


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 140), max_size=4),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    has=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_native_matches_whatever_the_shape(lengths, heads, dims, has, dtype):
    shape = (140, heads[0] * heads[1], heads[1], *dims)
    assert_matches(make(Problem(lengths, shape, len(lengths) + 1, *has), CPU, dtype), "native")


@pytest.mark.parametrize("problem", ["beam", "grouped"])
def test_strides_change_nothing(problem):
    arguments = make(PROBLEMS[problem], CPU, torch.float32)
    views = as_views(to(arguments, CPU, torch.float32))
    outputs = [assert_matches(given, "native") for given in (arguments, views)]
    assert torch.equal(*outputs)


def test_more_capacity_gives_the_same_bits():
    arguments = make(Problem([40, 130, 0, 7], (130, 2, 1, 16, 24), cache_rows=5), CPU, torch.float32)
    assert_more_capacity_gives_the_same_bits(arguments, "native", (130, 131, 1000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    arguments = make(Problem([0, 200, 3, *range(150, 190)], (200, 4, 2, 40, 64)), CPU, dtype)

    def compute():
        given = to(arguments, CPU, dtype)
        output = ops.decode_attention(**given, impl="native")
        return [output, given["key_cache"].nan_to_num(), given["value_cache"].nan_to_num()]

    native.assert_same_bits(compute)


def test_reordering_the_table_is_reordering_the_cache():
    assert_reordering_the_table_is_reordering_the_cache("native", CPU, torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 4, 4), (2, 0, 2, 2, 4, 4), (2, 3, 2, 2, 4, 0)], ids=str)
def test_empty_inputs_give_empty_outputs_or_zeros(shape):
    rows, *rest = shape
    found = ops.decode_attention(**make(Problem([0] * rows, tuple(rest), 2), CPU, torch.float32), impl="native")
    assert torch.equal(found, torch.zeros(rows, 2, shape[5]))


@pytest.mark.parametrize("parent", [-1, 3])
def test_a_parent_outside_the_cache_is_an_index_error(parent):
    arguments = make(Problem([4, 4, 4], (4, 2, 1, 4, 4)), CPU, torch.float32)
    arguments["parents"][1, 2] = parent
    with pytest.raises(IndexError, match=rf"^parents: expected rows 0 to 2, got {parent}, out of range"):
        ops.decode_attention(**arguments, impl="native")


def test_operators_obey_torch():
    names = "query", "key_cache", "value_cache", "lengths", "parents", "key", "value"
    for problem in ("beam", "one row each", "beam, cached"):
        arguments = make(PROBLEMS[problem], CPU, torch.float32)
        # opcheck compares the caches, in which NaN would differ from itself.
        given = [x if x is None or not x.is_floating_point() else x.nan_to_num() for x in map(arguments.get, names)]
        torch.library.opcheck(torch.ops.tfm_native.decode_attention.default, (*given, 0.25))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    arguments = make(PROBLEMS["beam"], CPU, torch.float32)

    def step(**given):
        return ops.decode_attention(**given, impl="native")

    torch._dynamo.reset()
    results = []
    for wrapped in (step, torch.compile(step, backend=backend, fullgraph=True)):
        given = to(arguments, CPU, torch.float32)
        results.append([wrapped(**given), given["key_cache"], given["value_cache"]])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_native_is_what_cpus_take():
    arguments = make(PROBLEMS["beam"], CPU, torch.float32)
    found, expected = (ops.decode_attention(**arguments, impl=impl) for impl in ("auto", "native"))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"native.*expected one of float32, bfloat16, got float16"):
        ops.decode_attention(**to(arguments, CPU, torch.float16), impl="native")
