// Where a row's keys and values lie in a cache, and their products with its queries and weights, read in place.
// Included where TFM_ISA is defined.
#pragma once

#include "cpu/attention/softmax.h"
#include "cpu/decode_attention/call.h"

namespace tfm::TFM_ISA {

template <class T>
TFM_INLINE T* place_of(const HeadRows& x, int64_t row, int64_t place, int64_t head) {
    return static_cast<T*>(x.data) + row * x.row + place * x.place + head * x.head;
}

template <class T>
void copy_row(const T* from, T* to, int64_t columns) {
    for (int64_t column = 0; column < columns; ++column)
        to[column] = from[column];
}

// Where the keys of a row lie in a cache, from its first element on; the last is repeated to fill a vector.
inline void list_places(const DecodeAttention& call, const HeadRows& cache, int64_t row, int64_t keys, int64_t head,
                        int64_t* places) {
    const int64_t base = head * cache.head, listed = call.key.data ? keys - 1 : keys;
    int64_t key = 0;
    if (call.parents) {
        const int32_t* const parents = call.parents + row * call.parents_row;
        for (; key < listed; ++key)
            places[key] = base + parents[key * call.parents_place] * cache.row + key * cache.place;
    }
    for (; key < keys; ++key)
        places[key] = base + row * cache.row + key * cache.place;
    for (; key % LANES; ++key)
        places[key] = places[keys - 1];
}

// Scores of `keys` keys, and -inf up to a whole vector; returns the largest of each lane.
template <class T>
Floats score(const DecodeAttention& call, const float* query, const int64_t* places, int64_t keys, float* scores) {
    const T* const cache = static_cast<const T*>(call.key_cache.data);
    const int64_t dim = call.dim, whole = dim / WIDTH * WIDTH;
    Floats top = broadcast(-INFINITE);
    for (int64_t first = 0; first < keys; first += WIDTH) {
        Floats parts[WIDTH] = {};
        for (int64_t column = 0; column < whole; column += WIDTH) {
            const Floats factor = load(query + column);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                parts[i] += load(cache + places[first + i] + column) * factor;
        }
        if (whole < dim) {
            const Floats factor = load(query + whole);
            for (int i = 0; i < WIDTH; ++i)
                parts[i] += load_some(cache + places[first + i] + whole, dim - whole) * factor;
        }
        const Floats found = sums_of(parts) * call.scale;
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
void weigh_values(const DecodeAttention& call, const int64_t* places, const float* weights, int64_t keys, float* sums) {
    const T* const cache = static_cast<const T*>(call.value_cache.data);
    int64_t column = 0;
    for (; column + 4 * WIDTH <= call.value_dim; column += 4 * WIDTH)
        weigh<4>(cache + column, places, weights, keys, 4 * WIDTH, sums + column);
    for (; column + 2 * WIDTH <= call.value_dim; column += 2 * WIDTH)
        weigh<2>(cache + column, places, weights, keys, 2 * WIDTH, sums + column);
    for (; column + WIDTH <= call.value_dim; column += WIDTH)
        weigh<1>(cache + column, places, weights, keys, WIDTH, sums + column);
    if (column < call.value_dim)
        weigh<1>(cache + column, places, weights, keys, call.value_dim - column, sums + column);
}

} // namespace tfm::TFM_ISA
