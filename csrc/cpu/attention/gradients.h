// What the host parts of attention's backward share.
#pragma once

#include "cpu/attention/host.h"

namespace tfm {

// Of the bias of `inputs`, summed over what it is broadcast along: bias_gradient.cpp.
void bias_gradient(const AttentionInputs& inputs, const Cotangents& given, const Tensor& dbias);

// Of its bias by distance: relative_bias_gradient.cpp.
void relative_bias_gradient(const AttentionInputs& inputs, const Cotangents& given, const Tensor& gradient);

// Of the arguments of a backward.
template <class Arguments>
Cotangents cotangents(const Arguments& a) {
    return {heads_of(a.dout), heads_of(a.output), statistics_of(a.statistics),
            a.dlse ? row_numbers(*a.dlse) : RowNumbers{}};
}

// Summed over the sequences, in their order; none where it is not wanted.
inline MaybeTensor extra_score_gradient(const ExtraScoreTensors& extra) {
    if (!extra.partials)
        return {};
    const MaybeTensor gradient = torch::stable::empty_like(*extra.scores.tensor);
    sum_blocks<double>(*extra.partials, {gradient});
    return gradient;
}

// Empty [parts, *x.shape]: in memory dense, as x's leading dimensions are, with the parts outside of the heads.
inline Tensor joined_rows(const Tensor& x, int64_t parts) {
    std::vector<int64_t> shape = shape_of(x), strides(shape.size() + 1, 1);
    const int64_t width = shape[1] * shape.back();
    strides[2] = shape.back();
    strides[0] = width;
    int64_t step = parts * width;
    const std::vector<int64_t> order = memory_order(x);
    for (auto dim = order.rbegin(); dim != order.rend(); ++dim)
        if (*dim != 1) {
            strides[*dim + 1] = step;
            step *= std::max<int64_t>(shape[*dim], 1);
        }
    shape.insert(shape.begin(), parts);
    return empty_strided(shape, strides, x.scalar_type(), x);
}

} // namespace tfm
