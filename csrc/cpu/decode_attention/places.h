// Where a row's keys and values lie in a cache. Included where TFM_ISA is defined.
#pragma once

#include "cpu/decode_attention/call.h"
#include "cpu/vector.h"

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

} // namespace tfm::TFM_ISA
