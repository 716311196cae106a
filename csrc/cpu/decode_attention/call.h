// One attention over a cache as its kernel sees it: where the tensors lie, and what scratch memory a task takes.
#pragma once

#include "cpu/attention/call.h"

namespace tfm {

// [rows, heads, columns], or of a cache [rows, places, heads, columns]; strides in elements, columns side by side.
struct HeadRows {
    void* data; // null: absent
    int64_t row, place, head;
};

struct DecodeAttention {
    HeadRows query, key, value, key_cache, value_cache, output;
    bool narrow; // bf16
    const int32_t* lengths;
    const int32_t* parents; // null: each row's keys are its own
    int64_t length_stride, parents_row, parents_place;
    int64_t key_heads, group, dim, value_dim, capacity, longest;
    float scale;
};

static inline int64_t keys_of(const DecodeAttention& call, int64_t row) {
    return larger(0, smaller(call.lengths[row * call.length_stride], call.capacity));
}

struct DecodeScratch {
    int64_t query, scores, sums, totals, key_places, value_places, floats;
};

static inline DecodeScratch decode_scratch(const DecodeAttention& call) {
    Carver carver{};
    DecodeScratch at;
    at.query = carve(carver, call.group, call.dim);
    at.scores = carve(carver, call.group, call.longest);
    at.sums = carve(carver, call.group, call.value_dim);
    at.totals = carve(carver, 1, call.group);
    // Two floats an address.
    at.key_places = carve(carver, 2, call.longest);
    at.value_places = carve(carver, 2, call.longest);
    at.floats = carver.used;
    return at;
}

} // namespace tfm
