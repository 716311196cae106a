// Dropout's mask on CPUs: Philox of common/philox.h, one counter a lane. Included where TFM_ISA is defined.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/philox.h"
#include "cpu/vector.h"

namespace tfm::TFM_ISA {

// Columns whose outcomes are drawn at once.
constexpr int DRAWN = 8 * WIDTH;

// The low and the high word of each lane's 64-bit product.
TFM_INLINE void multiply(Words a, uint32_t b, Words& low, Words& high) {
#if defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi32(static_cast<int>(b)), even = _mm512_mul_epu32((__m512i)a, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    low = (Words)_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
    high = (Words)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
#elif defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi32(static_cast<int>(b)), even = _mm256_mul_epu32((__m256i)a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
    for (int i = 0; i < WIDTH; ++i) {
        const uint64_t product = static_cast<uint64_t>(a[i]) * b;
        low[i] = static_cast<uint32_t>(product);
        high[i] = static_cast<uint32_t>(product >> 32);
    }
#endif
}

// The eight outcomes of each lane's counter (c0, c1, group, site), lane after lane.
TFM_INLINE void draw(const Dropout& dropout, Words c0, Words c1, int64_t group, uint16_t* outcomes) {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    Words c2 = Words{} + static_cast<uint32_t>(group), c3 = Words{} + dropout.site;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        Words low0, high0, low1, high1;
        multiply(c0, PHILOX_MULTIPLIER_0, low0, high0);
        multiply(c2, PHILOX_MULTIPLIER_1, low1, high1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += PHILOX_KEY_STEP_0;
        k1 += PHILOX_KEY_STEP_1;
    }
    // In the order of the columns: the four words of a lane side by side, each low half first.
    Words even[2], odd[2], ordered[4];
    zip(c0, c2, even[0], even[1]);
    zip(c1, c3, odd[0], odd[1]);
    zip(even[0], odd[0], ordered[0], ordered[1]);
    zip(even[1], odd[1], ordered[2], ordered[3]);
    __builtin_memcpy(outcomes, ordered, sizeof(ordered));
}

// The outcomes of columns [column, column + DRAWN) of a row; `column` is a multiple of 8, `group` the counter's third.
TFM_INLINE void draw(const Dropout& dropout, int64_t row, int64_t group, int64_t column, uint16_t* outcomes) {
    const Words c0 = (Words)lanes() + static_cast<uint32_t>(column / 8);
    draw(dropout, c0, Words{} + static_cast<uint32_t>(row), group, outcomes);
}

// -1 where the outcome keeps its column, for WIDTH columns.
TFM_INLINE Ints kept(const Dropout& dropout, const uint16_t* outcomes) {
    Halves drawn;
    __builtin_memcpy(&drawn, outcomes, sizeof(drawn));
    return __builtin_convertvector(drawn, Words) >= dropout.threshold;
}

// `value` times the scale where kept, else 0: infinity and NaN are dropped too.
TFM_INLINE Floats drop(const Dropout& dropout, const uint16_t* outcomes, Floats value) {
    return kept(dropout, outcomes) ? value * dropout.scale : Floats{};
}

// Drops columns [column, column + WIDTH) of a row, whose columns come in their order, by `outcomes` that are drawn
// where the last are used up. Without a seed nothing is dropped.
TFM_INLINE Floats drop_next(const Dropout& dropout, int64_t row, int64_t column, uint16_t (&outcomes)[DRAWN],
                            Floats value) {
    if (!dropout.seed)
        return value;
    if (column % DRAWN == 0)
        draw(dropout, row, 0, column, outcomes);
    return drop(dropout, outcomes + column % DRAWN, value);
}

} // namespace tfm::TFM_ISA
