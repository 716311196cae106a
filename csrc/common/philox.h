// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): dropout's source of chance.
//
// An element is kept where its 16 bits are at least `threshold` = round(65536 p). The counter of eight neighbouring
// columns is (column / 8, row, sequence * heads + head, site), the key the two words of an int64 seed, so that every
// backend draws the mask of tfm/reference/dropout.py. The CPU kernels draw it in vectors: cpu/dropout.h.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(TFM_EMULATED)
#define TFM_HOST_DEVICE __host__ __device__
#else
#define TFM_HOST_DEVICE
#endif

namespace tfm {

constexpr int PHILOX_ROUNDS = 7;
constexpr uint32_t PHILOX_MULTIPLIER_0 = 0xD2511F53, PHILOX_MULTIPLIER_1 = 0xCD9E8D57;
constexpr uint32_t PHILOX_KEY_STEP_0 = 0x9E3779B9, PHILOX_KEY_STEP_1 = 0xBB67AE85;

// What every kernel that drops out is told. `seed` points to where the seed lies, on a GPU in its memory.
struct Dropout {
    const int64_t* seed; // null: nothing is dropped
    uint32_t threshold;  // of the 65,536 outcomes so many drop an element
    float scale;         // of an element that is kept
    uint32_t site;
};

// The four words for eight neighbouring columns; column 2i has the low half of word i, column 2i + 1 the high one.
struct Philox {
    uint32_t words[4];

    static TFM_HOST_DEVICE Philox draw(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, int64_t seed) {
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
        for (int round = 0; round < PHILOX_ROUNDS; ++round) {
            const uint64_t product0 = static_cast<uint64_t>(c0) * PHILOX_MULTIPLIER_0;
            const uint64_t product1 = static_cast<uint64_t>(c2) * PHILOX_MULTIPLIER_1;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(product1);
            c3 = static_cast<uint32_t>(product0);
            k0 += PHILOX_KEY_STEP_0;
            k1 += PHILOX_KEY_STEP_1;
        }
        return {{c0, c1, c2, c3}};
    }

    TFM_HOST_DEVICE bool keeps(int column_of_eight, uint32_t threshold) const {
        return ((words[column_of_eight >> 1] >> (16 * (column_of_eight & 1))) & 0xFFFF) >= threshold;
    }
};

} // namespace tfm
