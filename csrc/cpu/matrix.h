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

// Rows in scratch memory begin at multiples of so many numbers, the widest vector's.
constexpr int64_t LANES = 16;

static inline int64_t padded(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

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

// A row in whole vectors of fp32: where it lies, if it lies so, else in `scratch`, with 0 behind its end.
TFM_INLINE const float* read_row(const Matrix& m, int64_t row, int64_t columns, float* scratch) {
    const int64_t place = row * m.stride;
    if (!m.narrow && columns % WIDTH == 0)
        return static_cast<const float*>(m.data) + place;
    for (int64_t column = 0; column < columns; column += WIDTH)
        store(scratch + column, get(m, place + column, columns - column));
    return scratch;
}

// Where a row is to be written in whole vectors; write_row then brings it to its place, if it is not there already.
TFM_INLINE float* row_to_write(const Matrix& m, int64_t row, int64_t columns, float* scratch) {
    return !m.narrow && columns % WIDTH == 0 ? static_cast<float*>(m.data) + row * m.stride : scratch;
}

TFM_INLINE void write_row(const Matrix& m, int64_t row, int64_t columns, const float* from) {
    if (!m.narrow && columns % WIDTH == 0)
        return;
    for (int64_t column = 0; column < columns; column += WIDTH)
        set(m, row * m.stride + column, load(from + column), columns - column);
}

} // namespace tfm::TFM_ISA

#endif
