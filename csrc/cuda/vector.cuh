// Eight neighbouring columns of a row: what a thread loads, computes with in fp32, draws dropout for, and stores.
//
// Aligned, eight 16-bit numbers are one load of 16 bytes, eight fp32 two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.cuh"

namespace tfm::cuda {

struct Octet {
    float value[8];

    __device__ float& operator[](int i) { return value[i]; }
    __device__ float operator[](int i) const { return value[i]; }
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline void narrow(float value, float& to) { to = value; }
__device__ inline void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& to) { to = __float2half_rn(value); }

template <class T>
__device__ float rounded(float value) {
    T narrowed;
    narrow(value, narrowed);
    return widen(narrowed);
}

template <class T>
struct alignas(16) Vector16 {
    T value[16 / sizeof(T)];
};

template <class T>
__device__ Octet load_vectors(const T* from) {
    constexpr int LENGTH = 16 / sizeof(T);
    Octet octet;
#pragma unroll
    for (int first = 0; first < 8; first += LENGTH) {
        const uint4 bits = *reinterpret_cast<const uint4*>(from + first);
        const auto& vector = reinterpret_cast<const Vector16<T>&>(bits);
#pragma unroll
        for (int i = 0; i < LENGTH; ++i)
            octet[first + i] = widen(vector.value[i]);
    }
    return octet;
}

// Returns what it stored.
template <class T>
__device__ Octet store_vectors(T* to, const Octet& octet) {
    constexpr int LENGTH = 16 / sizeof(T);
    Octet stored;
#pragma unroll
    for (int first = 0; first < 8; first += LENGTH) {
        uint4 bits;
        auto& vector = reinterpret_cast<Vector16<T>&>(bits);
#pragma unroll
        for (int i = 0; i < LENGTH; ++i) {
            narrow(octet[first + i], vector.value[i]);
            stored[first + i] = widen(vector.value[i]);
        }
        *reinterpret_cast<uint4*>(to + first) = bits;
    }
    return stored;
}

} // namespace tfm::cuda
