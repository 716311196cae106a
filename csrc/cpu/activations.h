// Activations and their derivatives in vectors, by the formulas and constants of kernels/activations.py.
#pragma once

#include "common/activation.h"

#ifdef TFM_ISA

#include "cpu/vector.h"

namespace tfm::TFM_ISA {

// A value with its derivative; one that only wants the value has the rest dropped by the compiler.
struct Activated {
    Floats value, derivative;
};

// The logistic function s and s (1 - s): from exp(-|x|), which cannot overflow, and without 1 - s, which loses digits.
TFM_INLINE Activated logistic(Floats x) {
    const Floats decay = exp(x < 0.0f ? x : -x), larger = 1.0f / (1.0f + decay), smaller = decay * larger;
    return {x < 0.0f ? smaller : larger, smaller * larger};
}

// The standard normal distribution, to 1e-7, and its density: both from one exponential.
TFM_INLINE Activated normal(Floats x) {
    const Floats decay = exp(-0.5f * x * x), t = 1.0f / (1.0f + 0.24748737341529164f * (x < 0.0f ? -x : x));
    Floats tail = 0.3814527054725581f - 0.09806015622971824f * t;
    tail = 0.33113558681972226f + t * (-0.33034976063448375f + t * tail);
    tail = 0.11560290067252812f + t * (0.0027282065141966105f + t * tail);
    tail = t * (0.09749051541147176f + t * tail) * decay;
    return {x < 0.0f ? tail : 1.0f - tail, 0.3989422804014327f * decay};
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
