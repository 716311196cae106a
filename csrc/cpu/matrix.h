// A matrix of fp32 or bf16 as the CPU kernels see it; where TFM_ISA is defined, a vector of it at a time, as fp32.
#pragma once

#include <cstdint>

namespace tfm {

// Where the numbers begin, how wide they are, and how many of them the rows are apart.
struct Matrix {
    void* data;
    bool narrow; // bf16
    int64_t stride;
};

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/vector.h"

namespace tfm::TFM_ISA {

// Of the element at `place`, or as many of a vector as `count` leaves; the rest is 0.
TFM_INLINE Floats get(const Matrix& m, int64_t place, int64_t count) {
    return m.narrow ? load(static_cast<const BFloat16*>(m.data) + place, count)
                    : load(static_cast<const float*>(m.data) + place, count);
}

TFM_INLINE void set(const Matrix& m, int64_t place, Floats value, int64_t count) {
    m.narrow ? store(static_cast<BFloat16*>(m.data) + place, value, count)
             : store(static_cast<float*>(m.data) + place, value, count);
}

TFM_INLINE Floats rounded(Floats value) { return widen(narrow(value)); }

// 0 beyond the row's end, so that sums may run over whole vectors.
TFM_INLINE Floats inside(Floats value, int64_t count) {
    return count >= WIDTH ? value : lanes() < static_cast<int32_t>(count) ? value : Floats{};
}

} // namespace tfm::TFM_ISA

#endif
