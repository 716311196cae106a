// Products of a row with the keys of a head, and of its weights with the values, all read in place, once. Included
// where TFM_ISA is defined.
//
// A vector of keys at a time is multiplied by the query lane by lane, and the products are then added up across: no key
// is copied or transposed, as it pays to do for many queries. place(i) is where key i lies, in elements.
#pragma once

#include "cpu/attention/softmax.h"

namespace tfm::TFM_ISA {

// Scores of `keys` keys, and -inf up to a whole vector, of which `place` tells, too; returns the largest of each lane.
// Keys are asked for two vectors ahead, up to the first `fetched`: the processor guesses no such order.
template <class T, class Place>
TFM_INLINE Floats score(const T* rows, Place place, int64_t keys, int64_t fetched, const float* query, int64_t dim,
                        float scale, float* scores) {
    const int64_t whole = dim / WIDTH * WIDTH;
    Floats top = broadcast(-INFINITE);
    for (int64_t first = 0; first < keys; first += WIDTH) {
        for (int64_t key = first + 2 * WIDTH; key < smaller(first + 3 * WIDTH, fetched); ++key)
            for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(rows + place(key)) + byte);
        Floats parts[WIDTH] = {};
        for (int64_t column = 0; column < whole; column += WIDTH) {
            const Floats factor = load(query + column);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                parts[i] += load(rows + place(first + i) + column) * factor;
        }
        if (whole < dim) {
            const Floats factor = load(query + whole);
            for (int i = 0; i < WIDTH; ++i)
                parts[i] += load_some(rows + place(first + i) + whole, dim - whole) * factor;
        }
        const Floats found = unfused(sums_of(parts) * scale);
        const Floats seen = lanes() < static_cast<int32_t>(smaller(keys - first, WIDTH)) ? found : broadcast(-INFINITE);
        store(scores + first, seen);
        top = maximum(top, seen);
    }
    return top;
}

// Adds weights · values to VECTORS vectors of the sums: eight chains of additions at once.
template <int VECTORS, class T>
TFM_INLINE void weigh(const T* values, const int64_t* places, const float* weights, int64_t keys, int64_t columns,
                      float* sums) {
    constexpr int KEYS = 8 / VECTORS;
    Floats parts[KEYS][VECTORS] = {};
    int64_t key = 0;
    for (; key + KEYS <= keys; key += KEYS)
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j)
                parts[i][j] += load(values + places[key + i] + j * WIDTH, columns - j * WIDTH) * weights[key + i];
    for (; key < keys; ++key)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j)
            parts[0][j] += load(values + places[key] + j * WIDTH, columns - j * WIDTH) * weights[key];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
        Floats total = load(sums + j * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; ++i)
            total += parts[i][j];
        store(sums + j * WIDTH, total);
    }
}

template <class T>
void weigh_values(const T* rows, const int64_t* places, const float* weights, int64_t keys, int64_t columns,
                  float* sums) {
    int64_t column = 0;
    for (; column + 4 * WIDTH <= columns; column += 4 * WIDTH)
        weigh<4>(rows + column, places, weights, keys, 4 * WIDTH, sums + column);
    for (; column + 2 * WIDTH <= columns; column += 2 * WIDTH)
        weigh<2>(rows + column, places, weights, keys, 2 * WIDTH, sums + column);
    for (; column + WIDTH <= columns; column += WIDTH)
        weigh<1>(rows + column, places, weights, keys, WIDTH, sums + column);
    if (column < columns)
        weigh<1>(rows + column, places, weights, keys, columns - column, sums + column);
}

} // namespace tfm::TFM_ISA
