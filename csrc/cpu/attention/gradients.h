// What the host parts of attention's backward share.
#pragma once

#include "cpu/attention/bias_sums.h"
#include "cpu/attention/host.h"

namespace tfm {

// The sums of ds that become the gradients of the biases, where these are wanted.
class BiasSumTensors {
public:
    BiasSums sums;

    BiasSumTensors(const AttentionInputs& inputs, const MaybeTensor& dbias, const MaybeTensor& drelative)
        : sums{.dense = nullptr, .relative = nullptr, .each = 1, .rows = 0, .row = 0, .shares_heads = false},
          dbias(dbias), drelative(drelative) {
        if (!dbias && !drelative)
            return;
        const Attention& call = inputs.call;
        const int64_t sequences = inputs.sequences();
        int64_t heads = call.heads, most = MOST_PARTS;
        if (dbias) {
            sums.shares_heads = dbias->size(1) == 1;
            sums.rows = dbias->size(2);
            sums.row = padded(dbias->size(3));
            heads = sums.shares_heads ? call.heads / call.group : call.heads;
            const int64_t size = std::max<int64_t>(1, heads * sums.rows * sums.row);
            most = dbias->size(0) > 1 ? sequences : std::clamp<int64_t>(MOST_FLOATS / size, 1, most);
        }
        sums.each = std::max<int64_t>(1, (sequences + most - 1) / std::max<int64_t>(1, most));
        const int64_t parts = (sequences + sums.each - 1) / sums.each;
        if (dbias) {
            dense = empty({parts, heads, sums.rows, sums.row}, ScalarType::Float, *dbias);
            sums.dense = static_cast<float*>(dense->data_ptr());
        }
        if (drelative) {
            relative = empty({parts, 1, call.heads * call.relative_bias.width()}, ScalarType::Float, *drelative);
            sums.relative = static_cast<float*>(relative->data_ptr());
        }
    }

    // To the gradients, each element rounded once.
    void store() const {
        if (drelative)
            sum_blocks<double>(*relative, {drelative});
        if (!dbias)
            return;
        const Heads to = heads_of(*dbias);
        const int64_t parts = dense->size(0), heads = dense->size(1), size = sums.rows * sums.row;
        // The blocks of an element: parts where sequences share it, heads where these do.
        const bool shares_sequences = dbias->size(0) == 1;
        const int64_t of_parts = shares_sequences ? parts : 1, of_heads = sums.shares_heads ? heads : 1;
        const int64_t rows = dbias->size(0) * dbias->size(1) * sums.rows, columns = dbias->size(3);
        for_rows(rows, columns * of_parts * of_heads, [&](int64_t begin, int64_t end) {
            std::vector<float> total(columns);
            for (int64_t place = begin; place < end; ++place) {
                const int64_t row = place % sums.rows, head = place / sums.rows % dbias->size(1),
                              sequence = place / sums.rows / dbias->size(1);
                std::fill(total.begin(), total.end(), 0.0f);
                for (int64_t part = 0; part < of_parts; ++part)
                    for (int64_t member = 0; member < of_heads; ++member) {
                        const float* const from =
                            sums.dense + ((sequence + part) * heads + head + member) * size + row * sums.row;
                        for (int64_t column = 0; column < columns; ++column)
                            total[column] += from[column];
                    }
                const int64_t first = sequence * to.sequence + head * to.head + row * to.row;
                if (to.narrow)
                    std::copy(total.begin(), total.end(), static_cast<torch::headeronly::BFloat16*>(to.data) + first);
                else
                    std::copy(total.begin(), total.end(), static_cast<float*>(to.data) + first);
            }
        });
    }

private:
    // Enough for the threads of the largest processors; and 64 MiB.
    static constexpr int64_t MOST_PARTS = 64, MOST_FLOATS = int64_t(1) << 24;
    MaybeTensor dbias, drelative, dense, relative;
};

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
