"""Elements of bf16 in Triton's interpreter, to the bit: each operation and cast against torch's bf16 on the CPU."""

from __future__ import annotations

import operator
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from oracle import assert_same_bits
from torch import Tensor

from tfm.ops import backends

if not backends.interpreting():
    pytest.skip("Triton compiles here", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
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


def computed(function, *given: Tensor, dtype: torch.dtype = BF16) -> Tensor:
    found = torch.full(given[0].shape, 77, dtype=dtype)
    elementwise[(1,)](given[0], given[-1], found, function, found.numel())
    return found


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
    # Which of two zeros is the smaller is nobody's rule.
    "minimum": (lambda x, y: tl.minimum(x, y, tl.PropagateNan.ALL) + 0.0, lambda x, y: torch.minimum(x, y) + 0.0),
    "maximum": (lambda x, y: tl.maximum(x, y, tl.PropagateNan.ALL) + 0.0, lambda x, y: torch.maximum(x, y) + 0.0),
    "clamp": (lambda x, y: tl.clamp(x, -1.5, 2.0, tl.PropagateNan.ALL), lambda x, y: x.clamp(-1.5, 2.0)),
    "where": (lambda x, y: tl.where(x > y, x, y), lambda x, y: torch.where(x > y, x, y)),
}
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name):
    functions = ARITHMETIC[name]
    ours, theirs = functions if isinstance(functions, tuple) else (functions, functions)
    assert_same_bits(computed(ours, *PAIRS), theirs(*PAIRS).to(BF16))


@pytest.mark.parametrize("compare", COMPARISONS)
def test_comparisons(compare):
    x, y = PAIRS
    assert_same_bits(computed(compare, x, y, dtype=torch.bool), compare(x, y))
    assert_same_bits(
        computed(lambda x, y: compare(x, y).to(tl.float32), x, y, dtype=torch.float32), compare(x, y).float()
    )


def test_minus():
    """Of zeros too: Triton subtracts from 0 before 3.8, and its minus is torch's from then on."""
    found, expected = computed(lambda x, y: -x, EVERY), -EVERY
    assert_same_bits(found.where(EVERY != 0, 0.0), expected.where(EVERY != 0, 0.0))
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
    assert_same_bits(found, torch.tensor(expected).bfloat16())


def test_fma_of_infinities():
    x, y = PAIRS
    found = computed(lambda x, y: tl.fma(x, y, tl.full([4096], 0.5, tl.bfloat16)), x, y)
    assert_same_bits(found, (x.double() * y.double() + 0.5).bfloat16())


def test_fp32_is_rounded_to_the_nearest_and_ties_to_even():
    """Each bf16, what lies just beside it, and what lies on, before and behind the middle to the next."""
    behind = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x4000, 0xC000])
    given = ((torch.arange(1 << 16)[:, None] << 16) + behind).to(torch.int32).view(torch.float32).flatten()
    assert_same_bits(computed(lambda x, y: tl.cast(x, tl.bfloat16), given), given.bfloat16())


def test_fp32_toward_zero():
    given = torch.cat((EVERY.float() * (1 + 2.0**-9), torch.tensor([3.4e38, -3.4e38]).repeat(1 << 15)))
    found = computed(lambda x, y: x.to(tl.bfloat16, fp_downcast_rounding="rtz"), given)
    cut = (given.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    assert_same_bits(found, cut.where(~given.isnan(), NAN))


def test_float64_is_rounded_once():
    given = [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-8, INF, NAN, -0.0, 1e300, 2.0**-134]
    given = torch.tensor(given, dtype=torch.float64)
    expected = [1 + 2.0**-7, 1.0, 1.0, INF, NAN, -0.0, INF, 0.0]
    assert_same_bits(computed(lambda x, y: tl.cast(x, tl.bfloat16), given), torch.tensor(expected).bfloat16())


@pytest.mark.parametrize("kind", [tl.int8, tl.uint8, tl.int16, tl.int32, tl.int64], ids=str)
def test_integers(kind):
    dtype = getattr(torch, str(kind))
    limits = torch.iinfo(dtype)
    given = torch.cat((torch.arange(-300, 300), torch.tensor([limits.min, limits.max, limits.max // 3]).repeat(200)))
    given = torch.nn.functional.pad(given, (0, 4096 - len(given))).clamp(limits.min, limits.max).to(dtype)
    assert_same_bits(computed(lambda x, y: tl.cast(x, tl.bfloat16), given), given.bfloat16())
    whole = given.bfloat16().clamp(max=limits.max // 2)
    assert_same_bits(computed(lambda x, y: tl.cast(x, kind), whole, dtype=dtype), whole.to(dtype))


@pytest.mark.parametrize("kind", [tl.float16, tl.float32, tl.float64], ids=str)
def test_other_floats(kind):
    dtype = getattr(torch, f"float{kind.primitive_bitwidth}")
    assert_same_bits(computed(lambda x, y: tl.cast(x, kind), EVERY, dtype=dtype), EVERY.to(dtype))
    given = EVERY.view(torch.float16).to(dtype)
    assert_same_bits(computed(lambda x, y: tl.cast(x, tl.bfloat16), given), given.bfloat16())


def test_bits():
    found = computed(lambda x, y: x.to(tl.int16, bitcast=True) ^ 0x55, EVERY, dtype=torch.int16)
    assert torch.equal(found, EVERY.view(torch.int16) ^ 0x55)
    assert torch.equal(computed(lambda x, y: x.to(tl.bfloat16, bitcast=True), found).view(torch.int16), found)
