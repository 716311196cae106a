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
    """Computes f(x); for a value without its derivative the compiler drops what only the derivative needs."""
    value, _ = activate_with_derivative(x, ACTIVATION)
    return value


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr):
    """Computes (f(x), f'(x)) of an fp32 tensor."""
    if ACTIVATION == "relu":
        # Comparisons let NaN through, as torch does.
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
def exp(high, low):
    """Computes e^(high + low) for high <= 0 and a far smaller low, within an ulp (Moshier, Cephes, expf.c).

    tl.exp multiplies by log2 e first, and that rounding is 60 ulps of the result at -87.
    """
    high = tl.where(high < -104.0, -104.0, high)
    # Added to 1.5 · 2^23, a number is rounded to an integer, which stands in the lowest bits.
    shifted = high * 1.4426950408889634 + 12582912.0
    power = shifted - 12582912.0
    # ln 2 in two parts, of which the first has so few digits that its product is exact.
    rest = high - power * 0.693359375
    rest = rest - power * -2.12194440e-4 + low
    series = 1.9875691500e-4 * rest + 1.3981999507e-3
    series = series * rest + 8.3334519073e-3
    series = series * rest + 4.1665795894e-2
    series = series * rest + 1.6666665459e-1
    series = series * rest + 5.0000001201e-1
    # 2^(power + 64), whose exponent is that of a normal number where that of the result is not.
    scale = ((shifted.to(tl.int32, bitcast=True) << 23) + (191 << 23)).to(tl.float32, bitcast=True)
    return (series * rest * rest + rest + 1.0) * scale * 5.421010862427522e-20


@triton.jit
def reciprocal(x):
    """Computes 1 / x of x from 1 to 2^100, within an ulp: by one step of Newton's, where / scales x first."""
    root = tl.rsqrt(x)
    near = root * root
    return near * (2.0 - x * near)


@triton.jit
def logistic(x):
    """Computes s(x) and s (1 - s) from exp(-|x|), which cannot overflow; 1 - s would lose its digits near 1."""
    decay = exp(-tl.abs(x), 0.0)
    larger = reciprocal(1.0 + decay)
    smaller = decay * larger
    return tl.where(x < 0.0, smaller, larger), smaller * larger


@triton.jit
def softplus(x):
    """Computes log(1 + e^x) within a few ulps: with e = e^-|x| its log(1 + e) is 2 artanh(e / (2 + e))."""
    decay = exp(-tl.abs(x), 0.0)
    ratio = decay / (2.0 + decay)
    square = ratio * ratio
    series = 0.0
    for k in tl.static_range(7):
        series = (series + 1.0 / (15 - 2 * k)) * square
    return tl.maximum(x, 0.0) + 2.0 * (ratio + ratio * series)


@triton.jit
def normal(x):
    """Computes the standard normal distribution and density, to a few ulps even where 1 - erf has no digits left.

    Near 0 half and an odd series; beyond, the density times a polynomial of t = 1 / (1 + 0.3 |x|), as Abramowitz and
    Stegun do ("Handbook of mathematical functions", 7.1.26), fitted for the least relative error up to |x| = 14.5.
    """
    # Beyond 14.5 both have reached their limits, and the square might overflow.
    size = tl.where(tl.abs(x) > 14.5, 14.5, tl.abs(x))
    # The square of x's first twelve digits is exact, and what they leave is small: the exponent is not rounded.
    first = (size.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    decay = exp(-0.5 * first * first, -0.5 * (size - first) * (size + first))
    t = reciprocal(1.0 + 0.3 * size)
    tail = 0.113542665 - 0.020743799 * t
    tail = -0.231580029 + t * tail
    tail = 0.196960895 + t * tail
    tail = -0.0840766843 + t * tail
    tail = 0.0987449857 + t * tail
    tail = 0.0774899905 + t * tail
    tail = 0.1104249 + t * tail
    tail = 0.119549804 + t * tail
    tail = t * (0.119687767 + t * tail) * decay
    square = size * size
    series = -0.00118344278 + 0.000105368427 * square
    series = 0.00997293952 + square * series
    series = -0.0664903456 + square * series
    near = 0.5 + x * (0.39894228 + square * series)
    below = tl.where(size < 0.67, near, tl.where(x < 0.0, tail, 1.0 - tail))
    return below, 0.3989422804014327 * decay


@triton.jit
def tanh(x):
    """Computes tanh within about an ulp of fp32 (Moshier, Cephes, tanhf.c); the interpreter has no libdevice."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = series * square * x + x
    # exp2 overflows to infinity, and the quotient to 0, as it should.
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
