// Activations and their derivatives in fp32: the formulas of kernels/activations.py, by the names of
// tfm.ops.feed_forward.
#pragma once

#include <type_traits>

#include "common/activation.h"
#include "cuda/launch.cuh"

namespace tfm::cuda {

struct Activated {
    float value, slope;
};

// s(x) and s (1 - s): from exp(-|x|), which cannot overflow, and without 1 - s, which loses its digits near 1.
__device__ inline Activated logistic(float x) {
    const float decay = expf(-fabsf(x));
    const float larger = __fdividef(1.0f, 1.0f + decay), smaller = decay * larger;
    return {x < 0.0f ? smaller : larger, smaller * larger};
}

// The standard normal distribution and its density from one exponential: a polynomial in the manner of Abramowitz and
// Stegun 7.1.26, right to 2e-9 besides rounding, gives the lesser tail.
__device__ inline Activated normal(float x) {
    const float decay = exp2f(-0.7213475204444817f * x * x);
    const float t = __fdividef(1.0f, 1.0f + 0.24748737341529164f * fabsf(x));
    float tail = 0.3814527054725581f - 0.09806015622971824f * t;
    tail = 0.33113558681972226f + t * (-0.33034976063448375f + t * tail);
    tail = 0.11560290067252812f + t * (0.0027282065141966105f + t * tail);
    tail = t * (0.09749051541147176f + t * tail) * decay;
    return {x < 0.0f ? tail : 1.0f - tail, 0.3989422804014327f * decay};
}

// f(x) and f'(x). NaN passes through, so comparisons are written as torch's.
template <Activation ACTIVATION>
__device__ Activated activate(float x) {
    if constexpr (ACTIVATION == Activation::RELU) {
        return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
    } else if constexpr (ACTIVATION == Activation::RELU_SQUARED) {
        const float positive = x <= 0.0f ? 0.0f : x;
        return {positive * positive, 2.0f * positive};
    } else if constexpr (ACTIVATION == Activation::GELU) {
        const Activated below = normal(x);
        return {x * below.value, below.value + x * below.slope};
    } else if constexpr (ACTIVATION == Activation::GELU_TANH) {
        // Beyond 16 both have reached their limits, and x² might overflow.
        const float near = x < -16.0f ? -16.0f : x > 16.0f ? 16.0f : x, square = near * near;
        const Activated share = logistic(1.5957691216057308f * near * (1.0f + 0.044715f * square));
        return {x * share.value,
                share.value + near * share.slope * (1.5957691216057308f + 0.2140644488178071f * square)};
    } else if constexpr (ACTIVATION == Activation::SILU) {
        const Activated share = logistic(x);
        return {x * share.value, share.value + x * share.slope};
    } else if constexpr (ACTIVATION == Activation::QUICK_GELU) {
        const Activated share = logistic(1.702f * x);
        return {x * share.value, share.value + 1.702f * x * share.slope};
    } else if constexpr (ACTIVATION == Activation::SIGMOID) {
        return logistic(x);
    } else {
        const float value = tanhf(x);
        return {value, 1.0f - value * value};
    }
}

// Calls use(std::integral_constant<Activation, ...>()) with this one; all threads of a launch take the same branch.
template <class Use>
__device__ void with_activation(Activation activation, const Use& use) {
    switch (activation) {
#define TFM_CASE(NAME)                                                                                                 \
    case Activation::NAME:                                                                                             \
        return use(std::integral_constant<Activation, Activation::NAME>());
        TFM_CASE(RELU)
        TFM_CASE(RELU_SQUARED)
        TFM_CASE(GELU)
        TFM_CASE(GELU_TANH)
        TFM_CASE(SILU)
        TFM_CASE(QUICK_GELU)
        TFM_CASE(SIGMOID)
        TFM_CASE(TANH)
#undef TFM_CASE
    }
}

} // namespace tfm::cuda
