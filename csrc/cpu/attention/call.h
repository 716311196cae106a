// One attention as its kernels for CPUs see it: where the tensors lie, and the rules.
//
// With position(i) = i + start, query i of a sequence may attend to key j where
//
//     j < key_length      position(i) - left <= j <= position(i) + right      its bits of the masks are set
//
// (causality is right = 0). Its score s is inner · q·k, or with a softcap outer · tanh(inner · q·k), plus the biases:
// of the two, and of their distance clip(j - position(i), -farthest, farthest). With the largest score of its row, top,
// a weight is exp2((s - top) · log2(e) - log2 Σ exp(s - top)). The difference comes first: a score may be finfo.min,
// whose product with log2(e) is no number. And top stays apart from the logarithm, of which it would leave nothing in a
// common sum.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "cpu/matrix.h"

namespace tfm {

// [B, H, S, D], or packed [N, H, D]: then a sequence's rows begin where its Extent says, and `sequence` is 0.
struct Heads {
    void* data; // null: absent
    bool narrow;
    int64_t sequence, head, row, column; // strides, in elements
};

// Bits of keys, 32 a word; `row` is 0 where all queries share them.
struct Bits {
    const int32_t* data; // null: all set
    int64_t sequence, head, row;
};

// fp32, one number for each query and head; neighbouring queries of what the forward writes lie side by side.
struct RowNumbers {
    float* data;
    int64_t sequence, head, row;
};

// Of each row the largest score and log2 Σ exp(s - top), the extra score included; without keys -inf and 0.
struct RowStatistics {
    RowNumbers tops, logs;
};

struct Extent {
    int64_t query_first, query_length;
    int64_t key_first, key_length;
    int64_t key_begin; // none before it has a bit of the mask: a multiple of 32
    int64_t key_rows;  // padded: those behind the last key, too
    int64_t start;
};

// What one thread does at a time: a head of a sequence, or some of its queries and keys.
struct Task {
    int64_t sequence, head, first_query, first_key;
};

// fp32 [heads, 2 farthest + 1], of each distance from -farthest on.
struct RelativeBias {
    const float* data; // null: absent
    int64_t farthest;

    int64_t width() const { return 2 * farthest + 1; }
};

// A window's side that is open. The sum of several such numbers still fits.
constexpr int64_t OPEN = int64_t(1) << 40;

struct Attention {
    Heads query, key, value, bias;
    RelativeBias relative_bias;
    Bits words;             // of each query: what it may attend to
    Bits keys;              // of the mask of the keys: what every query may attend to besides
    Bits reach;             // of all queries: a key that nobody attends to is read as 0, since 0 · NaN would be NaN
    Matrix extra_scores;    // of each head, one more in every row, of a key without a value; without data: none
    float* extra_gradients; // [sequences, heads], each of its own queries; null: not wanted
    const Extent* extents;
    int64_t heads, group, dim, value_dim;
    int64_t longest_query, longest_key;
    int64_t left, right;
    float inner, outer, scale; // outer: 0 without a softcap
    Dropout dropout;
};

// A tile of scores, 32 KiB, and the rows of q, k and v that belong to it stay in the second-level cache.
constexpr int64_t BLOCK_QUERIES = 64, BLOCK_KEYS = 128;
// Tiles begin at a word of bits, and with an octet of dropout's outcomes.
constexpr int64_t WORD_KEYS = 32;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Whether keys and values are read where they lie, by one query after the other: copies and transposes of them, for
// products of tiles, take longer than so few queries do. Every kernel of a call forms its scores in that one order.
constexpr int64_t FEW_QUERIES = 4;
static inline bool has_few_queries(const Attention& call) {
    return call.longest_query <= FEW_QUERIES && !call.dropout.seed && call.key.column == 1 && call.value.column == 1;
}

// What the backward is given besides.
struct Cotangents {
    Heads dout, output;
    RowStatistics statistics;
    RowNumbers dlse; // null: lse is used by nobody
};

// Scratch memory of a call. What inherits it carves its parts, one after the other: offsets in floats.
template <class Call>
struct Carver {
    const Call& call;
    int64_t floats = 0; // carved so far
};

template <class Call>
static inline int64_t carve(Carver<Call>& carver, int64_t rows, int64_t columns) {
    const int64_t offset = carver.floats;
    carver.floats += rows * padded(columns);
    return offset;
}

// The largest tile of this call.
static inline int64_t tile_queries(const Attention& call) { return smaller(BLOCK_QUERIES, padded(call.longest_query)); }
static inline int64_t tile_keys(const Attention& call) { return smaller(BLOCK_KEYS, padded(call.longest_key)); }

// Of dropout's outcomes for the largest tile, two a float.
static inline int64_t carve_outcomes(Carver<Attention>& carver) {
    return carve(carver, carver.call.dropout.seed ? tile_queries(carver.call) + LANES : 0, BLOCK_KEYS / 2);
}

} // namespace tfm
