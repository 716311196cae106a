"""bf16 in Triton's interpreter as a GPU computes it, by the bfloat16 that ml_dtypes adds to NumPy.

The interpreter keeps a bf16 as the integer of its bits, and adds, multiplies and compares those integers. `install`
has it keep values, which NumPy's functions widen to fp32, rounding each result once, ties to even. What remains are
loads and stores, whose C++ knows integers alone, and what NumPy would round where a GPU does not. Atomics are refused.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TOWARD_ZERO = interpreter._ir.ROUNDING_MODE.RTZ

shipped_np_dtype, shipped_convert_float = interpreter._get_np_dtype, interpreter._convert_float


def install() -> None:
    """Makes bf16 right in this process; does nothing where it is, by an earlier call or in a newer Triton.

    Raises:
        RuntimeError: Triton does not interpret here, or its interpreter is one that this does not make right.
    """
    if not isinstance(_sample, interpreter.InterpretedFunction):
        raise RuntimeError("bf16 in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")
    if is_right():
        return
    interpreter._get_np_dtype, interpreter._convert_float = np_dtype, convert_float
    interpreter.InterpreterBuilder, interpreter.ReduceOps = Builder, Reduction
    interpreter.interpreter_builder.__class__ = Builder
    if not is_right():
        raise RuntimeError(
            f"bf16 in the interpreter of triton {triton.__version__} is wrong, and this does not mend it"
        )


def is_right() -> bool:
    """Tells whether the interpreter loads, multiplies, subtracts, rounds and stores a bf16 matrix as torch does."""
    given = (torch.arange(256.0) / 7 - 9).bfloat16().view(16, 16)
    found = torch.zeros_like(given)
    try:
        _sample[(1,)](given, found)
    except InterpreterError:
        return False
    return torch.equal(found, (given.float() @ given.float()).bfloat16() - given * torch.tensor(1.7).bfloat16())


@triton.jit
def _sample(given, found):
    index = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    value = tl.load(given + index)
    tl.store(found + index, tl.dot(value, value).to(tl.bfloat16) - value * 1.7)


def np_dtype(dtype: Any) -> np.dtype:
    """Returns the NumPy dtype in which Triton's `dtype` is kept."""
    return BFLOAT16 if dtype.scalar == tl.bfloat16 else shipped_np_dtype(dtype)


def convert_float(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """Converts `values` from one of Triton's types to another."""
    if tl.bfloat16 not in (source, target) or source.is_fp8() or target.is_fp8():
        return shipped_convert_float(values, source, target, rounding_mode)
    round_ = toward_zero if rounding_mode == TOWARD_ZERO else to_nearest
    return round_(values, np_dtype(target))


def to_nearest(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds `values` to `dtype`, ties to even; float64 becomes bf16 by an odd fp32, which is no tie of bf16's."""
    if (values.dtype, dtype) == (np.float64, BFLOAT16):
        below = toward_zero(values, np.dtype(np.float32))
        values = odd(below, (below != values) & ~np.isnan(values))
    return values.astype(dtype)


def toward_zero(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds `values` to a narrower `dtype`, none larger than it was."""
    nearest = values.astype(dtype)
    return smaller(nearest, np.abs(nearest.astype(values.dtype)) > np.abs(values))


def smaller(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Returns one unit in the last place nearer to zero, `where` that is asked."""
    return (values.view(f"u{values.itemsize}") - where).view(values.dtype)


def odd(below: np.ndarray, inexact: np.ndarray) -> np.ndarray:
    """Sets the last bit of `below` where more was cut off: what is rounded after it is rounded as if once."""
    return (below.view(f"u{below.itemsize}") | inexact).view(below.dtype)


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations, where those of bf16 are not NumPy's own."""

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(np.array([value], dtype=np.float32).astype(BFLOAT16), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return super().cast_impl(src, dst_type)
        return TensorHandle(to_nearest(src.data, np_dtype(dst_type)), dst_type.scalar)

    def create_masked_load(
        self, ptrs: TensorHandle, mask: Any, other: TensorHandle | None, *policy: Any, **named: Any
    ) -> TensorHandle:
        """Loads 16 bits, seen as bf16."""
        if ptrs.get_element_ty() != tl.bfloat16:
            return super().create_masked_load(ptrs, mask, other, *policy, **named)
        integers = TensorHandle(ptrs.data, tl.pointer_type(tl.uint16), ptrs.attr)
        other = None if other is None else as_bits(other)
        loaded = super().create_masked_load(integers, mask, other, *policy, **named)
        return TensorHandle(loaded.data.view(BFLOAT16), tl.bfloat16)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: Any, *policy: Any, **named: Any
    ) -> None:
        super().create_masked_store(ptrs, as_bits(value), mask, *policy, **named)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """Rounds once: in float64 the product is exact, and what the sum loses is known (Knuth's TwoSum)."""
        if z.data.dtype != BFLOAT16:
            return super().create_fma(x, y, z)
        product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
        total = product + addend
        added = total - product
        lost = (product - (total - added)) + (addend - added)
        inexact = np.abs(lost) > 0  # False for the NaN beside an infinity.
        total = odd(smaller(total, inexact & ((lost < 0) != (total < 0))), inexact)
        return TensorHandle(to_nearest(total, BFLOAT16), tl.bfloat16)


def as_bits(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(handle.data.view(np.uint16), tl.uint16) if handle.data.dtype == BFLOAT16 else handle


class Reduction(interpreter.ReduceOps):
    """The interpreter's reductions; NumPy would add numbers of bf16 one by one, until they are too small to count."""

    def sum(self, input: Any) -> Any:
        """Adds halves to halves, each sum rounded, as a GPU's threads add."""
        data = input.handle.data
        if data.dtype != BFLOAT16:
            return super().sum(input)
        halves = data.ravel() if self.axis is None else np.moveaxis(data, self.axis, 0)
        while len(halves) > 1:
            middle = len(halves) // 2
            halves = halves[:middle] + halves[middle:]
        total = halves[0]
        if self.keep_dims:
            total = total.reshape((1,) * data.ndim) if self.axis is None else np.expand_dims(total, self.axis)
        return self.to_tensor(total, input.dtype)
