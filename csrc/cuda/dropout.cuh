// Dropout of eight neighbouring columns: one draw of Philox decides all of them, as in tfm/reference/dropout.py.
#pragma once

#include "cuda/vector.cuh"

namespace tfm::cuda {

// The decisions for columns 8 · octet to 8 · octet + 7 of a row, kept for as long as they are needed.
struct Keep {
    Philox bits;
    uint32_t threshold;
    float scale;

    __device__ Keep(const Dropout& dropout, int64_t row, int octet, int64_t seed)
        : bits(Philox::draw(static_cast<uint32_t>(octet), static_cast<uint32_t>(row), 0, dropout.site, seed)),
          threshold(dropout.threshold), scale(dropout.scale) {}

    // What is dropped becomes 0, whatever it was.
    __device__ void apply(Octet& octet) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            octet[i] = bits.keeps(i, threshold) ? octet[i] * scale : 0.0f;
    }
};

__device__ inline int64_t seed_of(const Dropout& dropout) { return dropout.seed ? *dropout.seed : 0; }

} // namespace tfm::cuda
