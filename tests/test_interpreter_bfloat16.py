"""bf16 in Triton's interpreter, to the bit: each operation, cast and reduction against torch's bf16 on the CPU."""

from __future__ import annotations

import operator
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tfm.ops import backends

if not backends.interpreting():
    pytest.skip("Triton compiles here", allow_module_level=True)

from tools.interpreter import bfloat16

BF16, INF, NAN = torch.bfloat16, float("inf"), float("nan")
# Every bf16, from 0 to NaN and from -0.0 to -NaN.
EVERY = torch.arange(1 << 16).to(torch.int16).view(BF16)


# Zero, denormals, neighbours of 1, the largest, infinity, NaN; ordinary ones from 0.001 to 1000.
SPECIAL = torch.tensor(
    [0.0, 2.0**-133, 127 * 2.0**-133, 2.0**-126, 1.0, 1 + 2.0**-7, 1 - 2.0**-8, 3.0, 256.0, 3.3895e38, INF, NAN]
)
ORDINARY = torch.cos(torch.arange(40.0) ** 2) * torch.logspace(-3, 3, 40)
SOME = torch.cat((SPECIAL, -SPECIAL, ORDINARY)).bfloat16()
PAIRS = SOME.repeat_interleave(64), SOME.repeat(64)


@triton.jit
def elementwise(first, second, found, FUNCTION: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(found + index, FUNCTION(tl.load(first + index), tl.load(second + index)))


@triton.jit
def reduction(given, found, FUNCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr):
    """LEFT: how many elements remain."""
    value = FUNCTION(tl.load(given + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]))
    tl.store(found + tl.arange(0, LEFT), tl.reshape(value, [LEFT]) if value.type.is_block() else value)


def computed(function, *given: Tensor, dtype: torch.dtype = BF16) -> Tensor:
    found = torch.full(given[0].shape, 77, dtype=dtype)
    elementwise[(1,)](given[0], given[-1], found, function, found.numel())
    return found


def reduced(function, given: Tensor, left: int, dtype: torch.dtype = BF16) -> Tensor:
    found = torch.full((left,), 77, dtype=dtype)
    reduction[(1,)](given, found, function, *given.shape, left)
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To the bit, the sign of a zero included; one NaN is as good as another."""
    assert found.dtype == expected.dtype
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = (x.masked_fill(x.isnan(), 0.0) for x in (found, expected))
        assert torch.equal(found.signbit(), expected.signbit())
    assert torch.equal(found, expected)


# By one function of both, or by Triton's and torch's.
ARITHMETIC = {
    "x + y": operator.add,
    "x - y": operator.sub,
    "x * y": operator.mul,
    "x * 1.7": (lambda x, y: x * 1.7, lambda x, y: x * torch.tensor(1.7).bfloat16()),
    "1 - x": lambda x, y: 1 - x,
    "x + full": (lambda x, y: x + tl.full([4096], 0.1, tl.bfloat16), lambda x, y: x + torch.tensor(0.1).bfloat16()),
    "x - zeros": (lambda x, y: x - tl.zeros([4096], tl.bfloat16), lambda x, y: x),
    "x / y": operator.truediv,
    "x / 3": lambda x, y: x / 3,
    "x % y": (operator.mod, lambda x, y: torch.from_numpy(np.fmod(x.double().numpy(), y.double().numpy()))),
    "abs": (lambda x, y: tl.abs(x), lambda x, y: x.abs()),
    "minimum": (lambda x, y: tl.minimum(x, y, tl.PropagateNan.ALL), torch.minimum),
    "maximum": (lambda x, y: tl.maximum(x, y, tl.PropagateNan.ALL), torch.maximum),
    "clamp": (lambda x, y: tl.clamp(x, -1.5, 2.0, tl.PropagateNan.ALL), lambda x, y: x.clamp(-1.5, 2.0)),
    "where": (lambda x, y: tl.where(x > y, x, y), lambda x, y: torch.where(x > y, x, y)),
    "exp2, by fp32": (lambda x, y: tl.exp2(tl.cast(x, tl.float32)), lambda x, y: x.float().exp2().bfloat16()),
}
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name):
    functions = ARITHMETIC[name]
    ours, theirs = functions if isinstance(functions, tuple) else (functions, functions)
    assert_same(computed(ours, *PAIRS), theirs(*PAIRS).to(BF16))


@pytest.mark.parametrize("compare", COMPARISONS)
def test_comparisons(compare):
    x, y = PAIRS
    assert_same(computed(compare, x, y, dtype=torch.bool), compare(x, y))
    assert_same(computed(lambda x, y: compare(x, y).to(tl.float32), x, y, dtype=torch.float32), compare(x, y).float())


def test_minus():
    """Of zeros too: Triton subtracts from 0 before 3.8, and its minus is torch's from then on."""
    found, expected = computed(lambda x, y: -x, EVERY), -EVERY
    assert_same(found.where(EVERY != 0, 0.0), expected.where(EVERY != 0, 0.0))
    assert (found[EVERY == 0] == 0).all()


def nearest(value: Fraction) -> float:
    """The bf16 nearest to a small `value`, of two the even one, by exact arithmetic."""
    around = torch.tensor(float(value)).bfloat16().view(torch.int16) + torch.arange(-1, 2)
    even_first = sorted(around.tolist(), key=lambda bits: bits % 2)
    candidates = torch.tensor(even_first, dtype=torch.int16).view(BF16).tolist()
    return min(candidates, key=lambda candidate: abs(Fraction(candidate) - value))


def test_fma_rounds_once():
    """1.5 · (1 + 2^-7) is a tie, which the smallest addend decides: beyond the bits of float64 too."""
    x = torch.tensor([1.5, -1.5]).bfloat16().repeat(8)
    y = torch.full((16,), 1 + 2.0**-7).bfloat16()
    z = torch.tensor([2.0**-60, -(2.0**-60), 2.0**-133, -(2.0**-133), 0.0, 3.0, 2.0**-9, -1.5]).bfloat16()
    z = z.repeat_interleave(2)
    expected = [
        nearest(Fraction(a) * Fraction(b) + Fraction(c))
        for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    ]
    found = computed(lambda x, z: tl.fma(x, tl.full([16], 1 + 2.0**-7, tl.bfloat16), z), x, z)
    assert_same(found, torch.tensor(expected).bfloat16())


def test_fma_of_infinities():
    x, y = PAIRS
    found = computed(lambda x, y: tl.fma(x, y, tl.full([4096], 0.5, tl.bfloat16)), x, y)
    assert_same(found, (x.double() * y.double() + 0.5).bfloat16())


def test_fp32_is_rounded_to_the_nearest_and_ties_to_even():
    """Each bf16, what lies just beside it, and what lies on, before and behind the middle to the next."""
    behind = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x4000, 0xC000])
    given = ((torch.arange(1 << 16)[:, None] << 16) + behind).to(torch.int32).view(torch.float32).flatten()
    assert_same(computed(lambda x, y: tl.cast(x, tl.bfloat16), given), given.bfloat16())


def test_fp32_toward_zero():
    given = torch.cat((EVERY.float() * (1 + 2.0**-9), torch.tensor([3.4e38, -3.4e38]).repeat(1 << 15)))
    found = computed(lambda x, y: x.to(tl.bfloat16, fp_downcast_rounding="rtz"), given)
    cut = (given.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    assert_same(found, cut.where(~given.isnan(), NAN))


def test_float64_is_rounded_once():
    given = torch.tensor(
        [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-8, INF, NAN, -0.0, 1e300, 2.0**-134]
    )
    expected = [1 + 2.0**-7, 1.0, 1.0, INF, NAN, -0.0, INF, 0.0]
    given = [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-8, INF, NAN, -0.0, 1e300, 2.0**-134]
    given = torch.tensor(given, dtype=torch.float64)
    expected = [1 + 2.0**-7, 1.0, 1.0, INF, NAN, -0.0, INF, 0.0]
    assert_same(computed(lambda x, y: tl.cast(x, tl.bfloat16), given), torch.tensor(expected).bfloat16())


INTEGERS = {
    tl.int8: torch.int8,
    tl.uint8: torch.uint8,
    tl.int16: torch.int16,
    tl.int32: torch.int32,
    tl.int64: torch.int64,
}


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integers(kind):
    limits = torch.iinfo(INTEGERS[kind])
    given = torch.cat((torch.arange(-300, 300), torch.tensor([limits.min, limits.max, limits.max // 3]).repeat(200)))
    given = torch.nn.functional.pad(given, (0, 4096 - len(given))).clamp(limits.min, limits.max).to(INTEGERS[kind])
    assert_same(computed(lambda x, y: tl.cast(x, tl.bfloat16), given), given.bfloat16())
    whole = given.bfloat16().clamp(max=limits.max // 2)
    assert_same(computed(lambda x, y: tl.cast(x, kind), whole, dtype=given.dtype), whole.to(given.dtype))


@pytest.mark.parametrize("kind", [tl.float16, tl.float32, tl.float64], ids=str)
def test_other_floats(kind):
    dtype = getattr(torch, f"float{kind.primitive_bitwidth}")
    assert_same(computed(lambda x, y: tl.cast(x, kind), EVERY, dtype=dtype), EVERY.to(dtype))
    given = EVERY.view(torch.float16).to(dtype)
    assert_same(computed(lambda x, y: tl.cast(x, tl.bfloat16), given), given.bfloat16())


def test_bits():
    found = computed(lambda x, y: x.to(tl.int16, bitcast=True) ^ 0x55, EVERY, dtype=torch.int16)
    assert torch.equal(found, EVERY.view(torch.int16) ^ 0x55)
    assert torch.equal(computed(lambda x, y: x.to(tl.bfloat16, bitcast=True), found).view(torch.int16), found)


def summed_by_halves(x: Tensor) -> Tensor:
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


@triton.jit
def larger_first(x, y):
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
    "own": (lambda x: tl.reduce(x, 1, larger_first), lambda x: one_by_one(x)[:, -1]),
    "own scan": (lambda x: tl.associative_scan(x, 1, larger_first), lambda x: one_by_one(x).flatten()),
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
    x = torch.randn(8, 16).bfloat16()
    assert_same(reduced(ours, x, theirs(x).numel()), theirs(x))


@pytest.mark.parametrize("name", ["sum of columns", "sum in fp32", "cumsum in fp32"])
def test_sums_of_infinities_and_nan(name):
    x = torch.ones(4, 4).bfloat16()
    x[0, 1], x[1, 0], x[1, 3], x[2, 2] = INF, INF, -INF, NAN
    ours, theirs = REDUCTIONS[name]
    assert_same(reduced(ours, x, theirs(x).numel()), theirs(x))


def test_sums_that_are_exact_are_torchs():
    x = torch.randint(-8, 8, (32, 8)).bfloat16()
    assert_same(reduced(lambda x: tl.sum(x, 0), x, 8), x.sum(0))


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
    assert_same(exact, expected)
    assert_same(found, expected.bfloat16())


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
    assert_same(found, expected)


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
    assert_same(found, expected)


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
