// CUDA's __half as far as the kernels use it: storage and conversions, rounded to nearest even. See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 0x3ff;
    if (exponent == 0)
        return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign ? -1.0f : 1.0f);
    return std::bit_cast<float>(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float size = std::fabs(value);
    uint32_t result;
    if (std::isnan(value)) {
        result = 0x7fff;
    } else if (size >= 65520.0f) {
        result = 0x7c00;
    } else if (size < 0x1p-14f) {
        // Below 2^-14 the steps are 2^-24: adding 1/2 leaves them as the last bits of an fp32, rounded by the addition.
        result = std::bit_cast<uint32_t>(size + 0.5f) - std::bit_cast<uint32_t>(0.5f);
    } else {
        const uint32_t whole = (bits & 0x7fffffff) - (112u << 23);
        result = (whole + 0xfff + (whole >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | result)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __float22half2_rn(float2 pair) { return {__float2half_rn(pair.x), __float2half_rn(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
