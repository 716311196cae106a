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

struct DecodeScratch : Carver<DecodeAttention> {
    int64_t query = carve(*this, call.group, call.dim);
    int64_t scores = carve(*this, call.group, call.longest);
    int64_t sums = carve(*this, call.group, call.value_dim);
    int64_t totals = carve(*this, 1, call.group);
    // Two floats an address.
    int64_t key_places = carve(*this, 2, call.longest);
    int64_t value_places = carve(*this, 2, call.longest);
};

} // namespace tfm
