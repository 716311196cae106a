"""Softmaxes that huge scores do not spoil: masks of -1e9 and finfo.min, logits of 1e5, are ordinary scores here.

No exponent is a difference of numbers that were scaled and rounded one by one. Scores s = unit · x that need not be
formed have the powers, for any shift of their row,

    exp2(fma(x, unit · log2(e), -shift))

whose one rounding is that of a small number: another shift changes all powers of a row alike, which is told from their
sum. Scores that are formed, as those with a bias must be to equal torch's, are subtracted first, exp2((s - top) ·
log2(e)): equal scores near finfo.min must not become infinite in base 2.

Two numbers are kept of each row, its top in natural units and log2 Σ exp(s - top), from which `exponent` makes the
weights again; their sum, the lse, would round the second away.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# A unit so small that every x has the power 1.
LEAST = tl.constexpr(1e-37)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# With 16-bit inputs, tiles of rows whose tops are all below this have their weights rebuilt by one fma from the row's
# lse: its rounding and the products' come to some 3 · 400 · 2^-24, a seventh of fp16's own rounding.
LARGE = tl.constexpr(256.0)


@triton.jit
def fma(x, y, z):
    """Computes x · y + z of fp32, rounded once; in the interpreter, which would round twice, by way of float64."""
    if INTERPRETED:
        return (x.to(tl.float64) * tl.cast(y, tl.float32) + z).to(tl.float32)
    return tl.fma(x, tl.cast(y, tl.float32), z)


@triton.jit
def fms(x, y, z):
    """Computes x · y - z, rounded once."""
    # Times -1 is a flag of the fma instruction; Triton's unary minus would subtract from 0.
    return fma(x, y, z * -1.0)


@triton.jit
def binary(unit):
    """Returns a non-negative unit in base 2; never 0, with which a masked -inf would make NaN."""
    return tl.maximum(unit, LEAST) * LOG2E


@triton.jit
def power(x, shift, unit, IS_FORMED: tl.constexpr):
    """Computes the power of a score less `shift`, or of x with shift and unit in base 2 (`binary`), broadcast."""
    if IS_FORMED:
        return tl.exp2((x - shift) * LOG2E)
    return tl.exp2(fms(x, unit, shift))


@triton.jit
def shrinkage(before, after, IS_FORMED: tl.constexpr):
    """Returns the factor that turns a sum of powers less the shift `before` into one less the shift `after`."""
    difference = before - after
    if IS_FORMED:
        difference *= LOG2E
    return tl.exp2(difference)


@triton.jit
def natural_top(shift, unit, IS_FORMED: tl.constexpr):
    """Returns (top, excess): the score at `shift`, and what log2 of a sum of powers less shift gains to be over top.

    Scores near top are meant: farther away they are too small to show how unit and binary(unit) were rounded.
    """
    if IS_FORMED:
        return shift, tl.zeros_like(shift)
    rounded = binary(unit)
    top = shift * LN2
    return top, shift * (fms(tl.maximum(unit, LEAST), LOG2E, rounded) / rounded) - fms(top, LOG2E, shift)


@triton.jit
def exponent(x, unit, top, log_sum, most, IS_FORMED: tl.constexpr):
    """Returns log2 of a score's weight, or of x's, by its row's statistics; at most `most`: 0, or -inf where masked."""
    difference = x - top if IS_FORMED else fms(x, unit, top)
    return tl.minimum(difference * LOG2E - log_sum, most)
