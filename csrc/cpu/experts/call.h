// A mixture of experts as its kernels see it: rows sorted by expert (tfm/operators/experts.py has the mathematics).
#pragma once

#include "cpu/isa.h"

#include "common/activation.h"
#include "cpu/matrix.h"

namespace tfm {

// Rows of one expert that are multiplied together, and features of one task.
constexpr int64_t TILE = 32, BLOCK = 64;

// Sorted rows `first` to `first + count`, of one expert.
struct RowTile {
    int64_t first, count;
};

// [tokens, columns], the rows so many numbers apart.
struct TokenRows {
    const float* data;
    int64_t stride;
};

// The sizes of a call, and its rows: row j stands for place order[j] % places of token order[j] / places, and expert e
// has the rows from offsets[e] to offsets[e + 1].
struct Routed {
    const int32_t *order, *place, *offsets;
    const float* weights; // [tokens, places]
    int64_t tokens, places, experts;
    int64_t depth, columns, width; // H, I, and pre's: I, or gated 2 I
    Activation activation;
    bool gated;
};

// Sums of each token's sorted rows, in the order of its places.
struct TokenSums {
    const float* rows; // a padded row each
    bool weighted;
    float* y; // [tokens, H]
};

TFM_KERNEL(sum_tokens, const Routed& routed, const TokenSums& call, int64_t first_token, int64_t last_token)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

TFM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A token's row into whole vectors, with 0 behind its end.
TFM_INLINE void copy_row(const TokenRows& from, int64_t token, int64_t columns, float* to) {
    const float* const row = from.data + token * from.stride;
    for (int64_t column = 0; column < columns; column += WIDTH)
        store(to + column, inside(load(row + column, columns - column), columns - column));
    for (int64_t column = (columns + WIDTH - 1) / WIDTH * WIDTH; column < padded(columns); ++column)
        to[column] = 0.0f;
}

// run(activation) with the activation as a constant.
template <Activation ACTIVATION>
struct Chosen {
    static constexpr Activation VALUE = ACTIVATION;
};

template <class Run>
TFM_INLINE void with_activation(Activation activation, const Run& run) {
    switch (activation) {
    case Activation::RELU:
        return run(Chosen<Activation::RELU>{});
    case Activation::RELU_SQUARED:
        return run(Chosen<Activation::RELU_SQUARED>{});
    case Activation::GELU:
        return run(Chosen<Activation::GELU>{});
    case Activation::GELU_TANH:
        return run(Chosen<Activation::GELU_TANH>{});
    case Activation::SILU:
        return run(Chosen<Activation::SILU>{});
    case Activation::QUICK_GELU:
        return run(Chosen<Activation::QUICK_GELU>{});
    case Activation::SIGMOID:
        return run(Chosen<Activation::SIGMOID>{});
    case Activation::TANH:
        return run(Chosen<Activation::TANH>{});
    }
}

} // namespace tfm::TFM_ISA

#endif
