"""Activations and their derivatives as device functions, in fp32, by the names of tfm.ops.feed_forward.

With s the logistic function and P, p the standard normal distribution and its density:

    name           f(x)                                        f'(x)
    relu           max(x, 0)                                   1 where x > 0
    relu_squared   max(x, 0)²                                  2 max(x, 0)
    gelu           x P(x)                                      P(x) + x p(x)
    gelu_tanh      x s(2u), u = √(2/π) (x + 0.044715 x³)       s + 2 x s (1 - s) u'
    silu           x s(x)                                      s + x s (1 - s)
    quick_gelu     x s(1.702 x)                                s + 1.702 x s (1 - s)
    sigmoid        s(x)                                        s (1 - s)
    tanh           tanh(x)                                     1 - tanh(x)²

GELU: Hendrycks and Gimpel, "Gaussian error linear units", 2016, section 2; its tanh is written with s, since
(1 + tanh(u)) / 2 = s(2u), which loses no digits where tanh(u) is near -1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """f(x); for a value without its derivative the compiler drops what only the derivative needs."""
    value, _ = activate_with_derivative(x, ACTIVATION)
    return value


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr):
    """(f(x), f'(x)) of an fp32 tensor."""
    if ACTIVATION == "relu":
        # Comparisons that let NaN through, as torch does.
        value = tl.where(x <= 0.0, 0.0, x)
        derivative = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu_squared":
        positive = tl.where(x <= 0.0, 0.0, x)
        value = positive * positive
        derivative = 2.0 * positive
    elif ACTIVATION == "gelu":
        below, density = normal(x)
        value = x * below
        derivative = below + x * density
    elif ACTIVATION == "gelu_tanh":
        # Beyond 16 both have reached their limits, and x² might overflow.
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)
        square = near * near
        share, slope = logistic(1.5957691216057308 * near * (1.0 + 0.044715 * square))
        value = x * share
        derivative = share + near * slope * (1.5957691216057308 + 0.2140644488178071 * square)
    elif ACTIVATION == "silu":
        share, slope = logistic(x)
        value = x * share
        derivative = share + x * slope
    elif ACTIVATION == "quick_gelu":
        share, slope = logistic(1.702 * x)
        value = x * share
        derivative = share + 1.702 * x * slope
    elif ACTIVATION == "sigmoid":
        value, derivative = logistic(x)
    else:
        tl.static_assert(ACTIVATION == "tanh", "expected an activation of tfm.ops.feed_forward")
        value = tanh(x)
        derivative = 1.0 - value * value
    return value, derivative


@triton.jit
def logistic(x):
    """s(x) and s (1 - s): from exp(-|x|), which cannot overflow, and without 1 - s, which loses its digits near 1."""
    decay = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + decay)
    smaller = decay * larger
    return tl.where(x < 0.0, smaller, larger), smaller * larger


@triton.jit
def normal(x):
    """The standard normal distribution and its density, to 1e-7: both from one exponential, where erf has its own.

    After Abramowitz and Stegun, "Handbook of mathematical functions", 7.1.26, whose polynomial leaves 8e-8; this one,
    two degrees longer, 2e-9 besides rounding. It gives the lesser tail, which keeps its digits there.
    """
    decay = tl.exp2(-0.7213475204444817 * x * x)
    t = 1.0 / (1.0 + 0.24748737341529164 * tl.abs(x))
    tail = 0.3814527054725581 - 0.09806015622971824 * t
    tail = 0.33113558681972226 + t * (-0.33034976063448375 + t * tail)
    tail = 0.11560290067252812 + t * (0.0027282065141966105 + t * tail)
    tail = t * (0.09749051541147176 + t * tail) * decay
    return tl.where(x < 0.0, tail, 1.0 - tail), 0.3989422804014327 * decay


@triton.jit
def tanh(x):
    """Within about an ulp of fp32 (Moshier, Cephes, tanhf.c); libdevice's is missing in the interpreter."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = series * square * x + x
    # exp2 overflows to infinity, and the quotient to 0, as it should.
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
