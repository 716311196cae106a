// Numbers in vectors, as wide as the instruction set: loads, stores, sums and exp. Included where TFM_ISA is defined.
//
// The compiler's own vector types give every operator for AVX2, AVX-512 and NEON alike; a comparison gives a vector of
// integers, 0 or -1, which `?:` takes. bf16 is computed in fp32 and rounded to nearest even where it is stored.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace tfm {

struct BFloat16 {
    uint16_t bits;
};

namespace TFM_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

#define TFM_INLINE static inline __attribute__((always_inline))

TFM_INLINE Floats broadcast(float value) { return value - Floats{}; }

TFM_INLINE Floats load(const float* from) {
    Floats result;
    __builtin_memcpy(&result, from, sizeof(result));
    return result;
}

TFM_INLINE Floats widen(Halves bits) {
#if defined(__AVX512F__)
    const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)bits); // GCC 12 makes four of it
#else
    const Words words = __builtin_convertvector(bits, Words);
#endif
    return (Floats)(words << 16);
}

TFM_INLINE Floats load(const BFloat16* from) {
    Halves bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return widen(bits);
}

TFM_INLINE void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof(value)); }

TFM_INLINE Halves narrow(Floats value) {
    const Words bits = (Words)value;
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Ints is_number = value == value;
    return __builtin_convertvector((is_number & (Ints)rounded) | (~is_number & 0x7FC0), Halves);
}

TFM_INLINE void store(BFloat16* to, Floats value) {
    const Halves bits = narrow(value);
    __builtin_memcpy(to, &bits, sizeof(bits));
}

#if defined(__AVX512F__)
// The first `count` of a vector, fewer than WIDTH; the rest is 0.
TFM_INLINE Floats load_some(const float* from, int64_t count) {
    return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}

TFM_INLINE Floats load_some(const BFloat16* from, int64_t count) {
    return widen((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from));
}

TFM_INLINE void store_some(float* to, Floats value, int64_t count) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)value);
}

TFM_INLINE void store_some(BFloat16* to, Floats value, int64_t count) {
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), (__m256i)narrow(value));
}
#else
// The first `count` of a vector, fewer than WIDTH; the rest is 0.
template <class T>
TFM_INLINE Floats load_some(const T* from, int64_t count) {
    T values[WIDTH] = {};
    for (int64_t i = 0; i < count; ++i)
        values[i] = from[i];
    return load(values);
}

template <class T>
TFM_INLINE void store_some(T* to, Floats value, int64_t count) {
    T values[WIDTH];
    store(values, value);
    for (int64_t i = 0; i < count; ++i)
        to[i] = values[i];
}
#endif

// All of a vector, or as much of it as `count` leaves.
template <class T>
TFM_INLINE Floats load(const T* from, int64_t count) {
    return count >= WIDTH ? load(from) : load_some(from, count);
}

template <class T>
TFM_INLINE void store(T* to, Floats value, int64_t count) {
    count >= WIDTH ? store(to, value) : store_some(to, value, count);
}

// 0, 1, 2, ...
TFM_INLINE Ints lanes() {
    Ints result;
    for (int i = 0; i < WIDTH; ++i)
        result[i] = i;
    return result;
}

// a0 b0 a1 b1 ... in two vectors.
template <class Vector>
TFM_INLINE void zip(Vector a, Vector b, Vector& first, Vector& second) {
    Ints one, two;
    for (int i = 0; i < WIDTH; ++i) {
        one[i] = i / 2 + (i % 2) * WIDTH;
        two[i] = one[i] + WIDTH / 2;
    }
    first = __builtin_shuffle(a, b, one);
    second = __builtin_shuffle(a, b, two);
}

TFM_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// The same number, which no operation after it is fused with: what two kernels compute is the same to the last bit.
TFM_INLINE Floats unfused(Floats x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#else
    asm("" : "+w"(x));
#endif
    return x;
}

// Lane 0 meets the lane `half` behind it, then the half of that, and so on.
TFM_INLINE float sum(Floats value) {
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half > 0; half /= 2)
        value += __builtin_shuffle(value, (lanes() + half) & (WIDTH - 1));
    return value[0];
}

TFM_INLINE float maximum(Floats value) {
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half > 0; half /= 2)
        value = maximum(__builtin_shuffle(value, (lanes() + half) & (WIDTH - 1)), value);
    return value[0];
}

// a · b + c in one rounding, for what a rounding lost: the compiler would take a · b - c for 0 where c is a · b.
TFM_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

// (high + low) · 2^n, |low| far below |high|; n is whole.
struct Power {
    Floats high, low, n;
};

// p · 2^n for whole n.
TFM_INLINE Floats times_power(Floats p, Floats n) {
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // In two factors, so that 2^128 is not one of them.
    const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
    return p * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
#endif
}

// Of a number, by its coefficients, the highest power's first.
template <class... Floating>
TFM_INLINE Floats polynomial(Floats x, float first, Floating... others) {
    Floats sum = broadcast(first);
    ((sum = sum * x + others), ...);
    return sum;
}

// exp(r) = 1 + r + bend(r), |r| <= ln(2) / 2 (Moshier, Cephes, expf.c).
TFM_INLINE Floats bend_of_exp(Floats r) {
    const Floats p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f);
    return p * r * r;
}

constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;

// The multiple of ln(2) next to x, of numbers below 2^22: adding 1.5 * 2^23 rounds to an integer.
TFM_INLINE Floats whole_powers(Floats x) { return (x * 1.44269504f + 12582912.0f) - 12582912.0f; }

// e^(x + low), of a `low` below the last digit of x from -87 to 89, with what its rounding would lose.
TFM_INLINE Power exp_in_parts(Floats x, Floats low) {
    const Floats n = whole_powers(x), rest = fused(n, broadcast(-LN2_HIGH), x);
    const Floats r = fused(n, broadcast(-LN2_LOW), rest), lost = fused(n, broadcast(-LN2_LOW), rest - r) + low;
    const Floats bend = bend_of_exp(r), high = 1.0f + r;
    return {high, (r - (high - 1.0f)) + (bend + lost * (high + bend)), n};
}

// Within 1 ulp; infinity above its range, NaN of NaN, and 0 below -87, since numbers that are not normal cost a hundred
// cycles each.
TFM_INLINE Floats exp(Floats x) {
    const Ints is_tiny = x < -87.0f;
    x = x > 89.0f ? broadcast(89.0f) : x;
    const Floats n = whole_powers(x), r = (x - n * LN2_HIGH) - n * LN2_LOW;
    const Floats found = times_power(bend_of_exp(r) + r + 1.0f, n);
    return is_tiny ? Floats{} : found;
}

TFM_INLINE Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7FFFFFFF); }

// Within about an ulp (Moshier, Cephes, tanhf.c): odd powers where the exponentials would cancel.
TFM_INLINE Floats tanh(Floats x) {
    const Floats square = x * x, size = absolute(x);
    const Floats p = polynomial(square, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                                -3.33332819422e-1f);
    const Floats far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    return size < 0.625f ? p * square * x + x : x < 0.0f ? -far : far;
}

} // namespace TFM_ISA
} // namespace tfm
