// What a softmax needs of its numbers: powers and logarithms to base 2, and sums of many rows at once. Included
// where TFM_ISA is defined.
#pragma once

#include "cpu/vector.h"

namespace tfm::TFM_ISA {

constexpr float LOG2E = 1.44269504f;
constexpr float INFINITE = __builtin_inff();

// 2^x for x up to 127, within 2 ulp (Moshier, Cephes, exp2f.c), NaN of NaN: a softmax has no x above 0. Below 2^-125 it
// is 0, since numbers that are not normal cost a hundred cycles each.
TFM_INLINE Floats exp2(Floats x) {
    const Ints is_tiny = x < -125.0f;
    const Floats shift = broadcast(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
    const Floats shifted = x + shift, r = x - (shifted - shift);
    const Floats p = polynomial(r, 1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                                5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f);
    return is_tiny ? Floats{} : p * (Floats)(((Words)shifted << 23) + 0x3F800000);
}

// log2(x) of what a softmax sums up, x from 1, within 2 ulp (Cephes, log2f.c); infinity and NaN of themselves.
TFM_INLINE Floats log2(Floats x) {
    // x = (1 + m) 2^n, 1 + m from sqrt(1/2) to sqrt(2).
    const Ints bits = (Ints)x - 0x3F3504F3, n = bits >> 23;
    const Floats m = (Floats)((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0f, square = m * m;
    const Floats p =
        polynomial(m, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                   -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
    // ln(1 + m) = m + small, times log2(e) in two parts, the least first.
    const Floats small = p * m * square - square * 0.5f;
    const Floats found = (small * (LOG2E - 1.0f) + m * (LOG2E - 1.0f)) + small + m;
    return x < INFINITE ? found + __builtin_convertvector(n, Floats) : x;
}

// Lane i: all of parts[i] taken together by `join`. Each round halves the vectors.
template <class Join>
TFM_INLINE Floats across(Floats (&parts)[WIDTH], Join join) {
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            Floats first, second;
            zip(parts[i], parts[i + half], first, second);
            parts[i] = join(first, second);
        }
    return parts[0];
}

TFM_INLINE Floats sums_of(Floats (&parts)[WIDTH]) {
    return across(parts, [](Floats a, Floats b) __attribute__((always_inline)) { return a + b; });
}

TFM_INLINE Floats maxima_of(Floats (&parts)[WIDTH]) {
    return across(parts, [](Floats a, Floats b) __attribute__((always_inline)) { return maximum(a, b); });
}

} // namespace tfm::TFM_ISA
