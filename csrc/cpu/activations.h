// Activations and their derivatives in vectors, by the formulas that kernels/activations.py lists.
#pragma once

#include "common/activation.h"

#ifdef TFM_ISA

#include "cpu/vector.h"

namespace tfm::TFM_ISA {

// A value with its derivative; one that only wants the value has the rest dropped by the compiler.
struct Activated {
    Floats value, derivative;
};

// The logistic function s, within 2 ulp, and s (1 - s): from exp(-|x|), which cannot overflow, and without 1 - s, which
// loses digits.
TFM_INLINE Activated logistic(Floats x) {
    const Floats decay = exp(-absolute(x));
    const Floats total = 1.0f + decay, lost = decay - (total - 1.0f), inverse = 1.0f / total;
    // What the sum and the quotient lose, too.
    const Floats part = x < 0.0f ? decay : broadcast(1.0f), share = part * inverse;
    const Floats rest = fused(-share, total, part) - share * lost;
    return {share + rest * inverse, decay * inverse * inverse};
}

// log(1 + e^x) within a few ulps: with e = e^-|x| its log(1 + e) is 2 artanh(e / (2 + e)).
TFM_INLINE Floats softplus(Floats x) {
    const Floats decay = exp(-absolute(x)), ratio = decay / (2.0f + decay), square = ratio * ratio;
    const Floats series =
        square * polynomial(square, 1.0f / 15, 1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3);
    return maximum(x, Floats{}) + 2.0f * (ratio + ratio * series);
}

// The standard normal distribution, within 2 ulp in its tail, too, and its density.
//
// The tail is exp(-x² / 2) · t Q(t) with t = 1 / (1 + c |x|), in the manner of Abramowitz and Stegun 7.1.26. What x²
// loses by its rounding goes into the exponent, and so does what t loses, times the tail's sensitivity to it; what the
// products lose is added in the end. Q is right to 2^-30 of itself. Near 0, where t matters most, powers of x serve.
TFM_INLINE Activated normal(Floats x) {
    constexpr float FARTHEST = 12.9f, C = 0.24748737341529164f;
    const Floats size = absolute(x), near = size > FARTHEST ? broadcast(FARTHEST) : size;
    const Floats square = near * near, square_lost = fused(near, near, -square);
    const Floats divisor = 1.0f + C * near, t = 1.0f / divisor;
    const Floats t_lost = fused(-t, divisor, broadcast(1.0f)) - t * fused(broadcast(C), near, 1.0f - divisor);
    const Floats q =
        polynomial(t, 2.4561498925e-02f, -1.0620048546e-01f, 1.4856513201e-01f, -8.4955684438e-02f, 9.8173459817e-02f,
                   4.5808365379e-02f, 8.4353468150e-02f, 9.2194464699e-02f, 9.8768169051e-02f);
    const Floats last = q * t, sum = last + 9.8732190532e-02f, sum_lost = last - (sum - 9.8732190532e-02f);
    const Floats factor = t * sum, factor_lost = fused(t, sum, -factor) + t * (sum_lost + fused(q, t, -last));

    const Power density = exp_in_parts(-0.5f * square, -0.5f * square_lost);
    const Floats low = density.low + density.high * ((0.59f + 2.6f * t) * t_lost);
    const Floats product = density.high * factor, lost = fused(density.high, factor, -product);
    const Floats sum_of_all = product + (lost + (density.high * factor_lost + low * factor));
    // Beyond it the tail is no normal number.
    const Floats tail = size > FARTHEST ? Floats{} : times_power(sum_of_all, density.n);
    const Floats whole = size > FARTHEST ? Floats{} : density.high + density.low;

    const Floats odd = polynomial(square, -7.9013280837e-06f, 1.1398916566e-04f, -1.1866811729e-03f, 9.9734200546e-03f,
                                  -6.6490368399e-02f);
    // 1 / sqrt(2 pi), and what is left of it.
    const Floats slope = broadcast(0.39894228f), middle = fused(x, slope, broadcast(0.5f));
    const Floats rest = fused(x, slope, 0.5f - middle) + x * (odd * square + -1.1577e-08f);
    const Floats far = x < 0.0f ? tail : 1.0f - tail;
    return {size < 0.9f ? middle + rest : far, slope * times_power(whole, density.n)};
}

template <Activation ACTIVATION>
TFM_INLINE Activated activate(Floats x) {
    const Floats zero{}, one = broadcast(1.0f);
    if constexpr (ACTIVATION == Activation::RELU)
        return {x <= 0.0f ? zero : x, x <= 0.0f ? zero : one}; // a comparison that lets NaN through
    if constexpr (ACTIVATION == Activation::RELU_SQUARED) {
        const Floats positive = x <= 0.0f ? zero : x;
        return {positive * positive, 2.0f * positive};
    }
    if constexpr (ACTIVATION == Activation::GELU) {
        const Activated below = normal(x);
        return {x * below.value, below.value + x * below.derivative};
    }
    if constexpr (ACTIVATION == Activation::GELU_TANH) {
        // Beyond 16 both have reached their limits, and the square might overflow.
        const Floats limit = broadcast(16.0f), near = x > limit ? limit : x < -limit ? -limit : x;
        const Floats square = near * near;
        const Activated share = logistic(1.5957691216057308f * near * (1.0f + 0.044715f * square));
        const Floats slope = 1.5957691216057308f + 0.2140644488178071f * square;
        return {x * share.value, share.value + near * share.derivative * slope};
    }
    if constexpr (ACTIVATION == Activation::SILU || ACTIVATION == Activation::QUICK_GELU) {
        constexpr float STEEPNESS = ACTIVATION == Activation::SILU ? 1.0f : 1.702f;
        const Activated share = logistic(STEEPNESS * x);
        return {x * share.value, share.value + STEEPNESS * x * share.derivative};
    }
    if constexpr (ACTIVATION == Activation::SIGMOID)
        return logistic(x);
    const Floats value = tanh(x);
    return {value, 1.0f - value * value};
}

} // namespace tfm::TFM_ISA

#endif
