// Products of an expert's weight by the rows of a few tokens, as decoding has them: a dot product for each feature and
// token, along which both lie side by side. A vector of tokens would be empty but for a lane or two.
#pragma once

#include "cpu/vector.h"

namespace tfm::TFM_ISA {

// More tokens are multiplied as a transposed tile.
constexpr int64_t FEW = 4;

// out [features, `out_row` apart], the first vector of each row: weights [features, depth] by x [COUNT, `x_row` apart].
template <int COUNT>
static void dot_products(int64_t features, int64_t depth, const float* weights, const float* x, int64_t x_row,
                         float* out, int64_t out_row) {
    for (int64_t feature = 0; feature < features; ++feature, weights += depth, out += out_row) {
        Floats even[COUNT] = {}, odd[COUNT] = {};
        int64_t k = 0;
        for (; k + 2 * WIDTH <= depth; k += 2 * WIDTH) {
            const Floats one = load(weights + k), other = load(weights + k + WIDTH);
            for (int i = 0; i < COUNT; ++i) {
                even[i] += one * load(x + i * x_row + k);
                odd[i] += other * load(x + i * x_row + k + WIDTH);
            }
        }
        for (; k < depth; k += WIDTH)
            for (int i = 0; i < COUNT; ++i)
                even[i] += load(weights + k, depth - k) * load(x + i * x_row + k, depth - k);
        store(out, Floats{});
        for (int i = 0; i < COUNT; ++i)
            out[i] = sum(even[i] + odd[i]);
    }
}

static void dot_products(int64_t count, int64_t features, int64_t depth, const float* weights, const float* x,
                         int64_t x_row, float* out, int64_t out_row) {
    switch (count) {
    case 1:
        return dot_products<1>(features, depth, weights, x, x_row, out, out_row);
    case 2:
        return dot_products<2>(features, depth, weights, x, x_row, out, out_row);
    case 3:
        return dot_products<3>(features, depth, weights, x, x_row, out, out_row);
    default:
        return dot_products<4>(features, depth, weights, x, x_row, out, out_row);
    }
}

} // namespace tfm::TFM_ISA
