"""Tiles of bf16 in Triton's interpreter, to the bit: reductions, tl.dot and memory; and how it is made right."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from oracle import assert_same_bits
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from tfm.ops import backends

if not backends.interpreting():
    pytest.skip("Triton compiles here", allow_module_level=True)

from tools.interpreter import bfloat16

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
BF16, INF, NAN = torch.bfloat16, float("inf"), float("nan")


@triton.jit
def reduction(given, found, FUNCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr):
    """LEFT: how many elements remain."""
    value = FUNCTION(tl.load(given + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]))
    tl.store(found + tl.arange(0, LEFT), tl.reshape(value, [LEFT]) if value.type.is_block() else value)


def reduced(function, given: Tensor, left: int) -> Tensor:
    found = torch.full((left,), 77, dtype=BF16)
    reduction[(1,)](given, found, function, *given.shape, left)
    return found


def summed_by_halves(x: Tensor) -> Tensor:
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


@triton.jit
def add_twice(x, y):
    return x + y * 2.0


REDUCTIONS = {
    "sum of columns": (lambda x: tl.sum(x, 1), lambda x: summed_by_halves(x.T)),
    "sum of rows": (lambda x: tl.sum(x, 0, keep_dims=True), summed_by_halves),
    "sum": (lambda x: tl.sum(x), lambda x: summed_by_halves(x.flatten()).view(1)),
    "sum, one by one": (lambda x: tl.sum(x, keep_dims=True), lambda x: summed_by_halves(x.flatten()).view(1)),
    "sum in fp32": (lambda x: tl.sum(x, 1, dtype=tl.float32), lambda x: x.float().sum(1).bfloat16()),
    "max": (lambda x: tl.max(x, 1), lambda x: x.amax(1)),
    "min": (lambda x: tl.min(x, 0), lambda x: x.amin(0)),
    "max of all": (lambda x: tl.max(x), lambda x: x.max().view(1)),
    "argmax": (lambda x: tl.argmax(x, 1), lambda x: x.argmax(1).bfloat16()),
    "argmin": (lambda x: tl.argmin(x, 0), lambda x: x.argmin(0).bfloat16()),
    "cumsum in fp32": (lambda x: tl.cumsum(x, 1, dtype=tl.float32), lambda x: x.float().cumsum(1).bfloat16().flatten()),
    "own": (lambda x: tl.reduce(x, 1, add_twice), lambda x: one_by_one(x)[:, -1]),
    "own scan": (lambda x: tl.associative_scan(x, 1, add_twice), lambda x: one_by_one(x).flatten()),
    "sort": (lambda x: tl.sort(x), lambda x: x.sort(1).values.flatten()),
    "transposed": (lambda x: tl.trans(x), lambda x: x.T.flatten()),
}


def one_by_one(x: Tensor) -> Tensor:
    columns = [x[:, 0]]
    for column in x.unbind(1)[1:]:
        columns.append(columns[-1] + column * 2.0)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name):
    ours, theirs = REDUCTIONS[name]
    # No two alike, with sums that are exact in fp32, and not in bf16.
    x = ((torch.randperm(511)[:128] - 255) / 64).bfloat16().view(8, 16)
    assert_same_bits(reduced(ours, x, theirs(x).numel()), theirs(x))


@pytest.mark.parametrize("name", ["sum of columns", "sum in fp32", "cumsum in fp32"])
def test_sums_of_infinities_and_nan(name):
    x = torch.ones(4, 4).bfloat16()
    x[0, 1], x[1, 0], x[1, 3], x[2, 2] = INF, INF, -INF, NAN
    ours, theirs = REDUCTIONS[name]
    assert_same_bits(reduced(ours, x, theirs(x).numel()), theirs(x))


def test_sums_that_are_exact_are_torchs():
    x = torch.randint(-8, 8, (32, 8)).bfloat16()
    assert_same_bits(reduced(lambda x: tl.sum(x, 0), x, 8), x.sum(0))


@triton.jit
def product(first, second, found, exact, DEPTH: tl.constexpr):
    index, depth = tl.arange(0, 16), tl.arange(0, DEPTH)
    x = tl.load(first + index[:, None] * DEPTH + depth[None, :])
    y = tl.load(second + depth[:, None] * 16 + index[None, :])
    at = index[:, None] * 16 + index[None, :]
    acc = tl.dot(x, y, tl.full([16, 16], 0.5, tl.float32))
    tl.store(exact + at, acc)
    tl.store(found + at, acc)


@pytest.mark.parametrize("special", [None, INF, NAN])
def test_dot_accumulates_in_fp32(special):
    """Small integers: whose sums are exact in fp32, and not in bf16."""
    x, y = torch.randint(-100, 100, (16, 256)).bfloat16(), torch.randint(-100, 100, (256, 16)).bfloat16()
    if special is not None:
        x[3, 5] = special
    found, exact = torch.empty(16, 16, dtype=BF16), torch.empty(16, 16)
    product[(1,)](x, y, found, exact, 256)
    expected = (x.double() @ y.double() + 0.5).float()
    assert_same_bits(exact, expected)
    assert_same_bits(found, expected.bfloat16())


@triton.jit
def memory(given, found, INSIDE: tl.constexpr):
    row, column = tl.arange(0, 8)[:, None], tl.arange(0, 16)[None, :]
    inside = (row < INSIDE) & (column < INSIDE)
    at = row * 16 + column
    value = tl.load(given + at, mask=inside, other=-1.7) + tl.load(given + at, mask=inside, other=0.0)
    tl.store(found + at, value, mask=(column < INSIDE))
    tl.store(found + 15, tl.load(given + 1) + tl.load(given + 1, mask=INSIDE > 9))


def test_memory_that_is_masked_is_left():
    given = torch.randn(8, 16).bfloat16()
    found = torch.full_like(given, 77)
    memory[(1,)](given, found, 5)
    expected = torch.full_like(given, 77)
    expected[:, :5] = torch.tensor(-1.7)
    expected[:5, :5] = 2 * given[:5, :5]
    expected[0, 15] = given[0, 1]
    assert_same_bits(found, expected)


@triton.jit
def added(found):
    tl.atomic_add(found, tl.load(found))


def test_atomics_are_refused():
    with pytest.raises(InterpreterError):
        added[(1,)](torch.ones(1, dtype=BF16))


@triton.jit
def described(given, found, COLUMNS: tl.constexpr):
    source = tl.make_tensor_descriptor(given, [5, COLUMNS], [COLUMNS, 1], [8, 16], padding_option="nan")
    target = tl.make_tensor_descriptor(found, [5, COLUMNS], [COLUMNS, 1], [8, 16])
    value = source.load([0, 8])
    target.store([0, 8], tl.where(value == value, value * 3.0, -1.0))


def test_tensor_descriptors():
    storage = torch.randn(8, 24).bfloat16()
    found = torch.full_like(storage, 77)
    described[(1,)](storage, found, 24)
    expected = torch.full_like(storage, 77)
    expected[:5, 8:] = storage[:5, 8:] * 3.0
    assert_same_bits(found, expected)


@pytest.fixture
def shipped(monkeypatch):
    """The interpreter as Triton ships it."""
    monkeypatch.setattr(interpreter, "_get_np_dtype", bfloat16.shipped_np_dtype)
    monkeypatch.setattr(interpreter, "_convert_float", bfloat16.shipped_convert_float)
    monkeypatch.setattr(interpreter, "InterpreterBuilder", bfloat16.Builder.__base__)
    monkeypatch.setattr(interpreter, "ReduceOps", bfloat16.Reduction.__base__)
    monkeypatch.setattr(interpreter.interpreter_builder, "__class__", bfloat16.Builder.__base__)


def state():
    builder = type(interpreter.interpreter_builder)
    return builder, interpreter._get_np_dtype, interpreter._convert_float, interpreter.ReduceOps


def test_what_is_right_is_left_alone(shipped, monkeypatch):
    before = state()
    monkeypatch.setattr(bfloat16, "is_right", lambda: True)
    bfloat16.install()
    assert state() == before


def test_what_is_wrong_is_made_right_once(shipped):
    before = state()
    if bfloat16.is_right():
        pytest.skip("this Triton's own bf16 is right")
    bfloat16.install()
    after = state()
    assert bfloat16.is_right()
    assert not set(before) & set(after)
    bfloat16.install()
    assert state() == after


def test_what_stays_wrong_is_an_error(shipped, monkeypatch):
    monkeypatch.setattr(bfloat16, "is_right", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"^bf16 in the interpreter of triton [\d.]+ is wrong, and this does not mend"
    ):
        bfloat16.install()


def test_without_the_interpreter_there_is_nothing_to_mend(monkeypatch):
    monkeypatch.setattr(bfloat16, "_sample", object())
    with pytest.raises(RuntimeError, match=r"set TRITON_INTERPRET=1 before triton is imported$"):
        bfloat16.install()
