// LayerNorm and RMSNorm behind a bias, dropout and a residual connection: the formulas of kernels/norm.py.
//
// A row goes through three short passes while it lies in the first-level cache: h is formed, stored and summed; its
// squared deviations are summed; y is written. The backward needs two: the sums of g and g z, then every gradient.
// Rows are shared among threads. The parameters' gradients are sums over rows: each block of rows, whose size the
// number of rows alone decides, adds up its own, and the blocks are added in their order, so that the bits are the same
// on any number of threads.
#include "cpu/isa.h"

#include "common/philox.h"
#include "cpu/matrix.h"

namespace tfm {

struct NormForward {
    Matrix x, residual, y, h; // h: x itself where there is no residual
    Matrix x_bias, weight, bias;
    float* mean; // null: RMSNorm
    float* rstd;
    int64_t columns;
    float eps, weight_offset;
    bool has_residual, round_first;
    Dropout dropout;
};

struct NormBackward {
    Matrix dy, dh, h, dx, dresidual, weight;
    const float* mean;
    const float* rstd;
    float* sums; // [blocks, 3, columns]: of dweight, dbias and dx_bias; null where none is wanted
    int64_t rows, columns, block_rows;
    float weight_offset;
    Dropout dropout;
};

TFM_KERNEL(norm_forward, const NormForward& call, int64_t first_row, int64_t last_row)
TFM_KERNEL(norm_backward, const NormBackward& call, int64_t first_block, int64_t last_block)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/dropout.h"

namespace tfm::TFM_ISA {

void norm_forward(const NormForward& call, int64_t first_row, int64_t last_row) {
    const int64_t columns = call.columns;
    uint16_t outcomes[DRAWN];
    for (int64_t row = first_row; row < last_row; ++row) {
        Floats total{};
        const int64_t h_row = row * call.h.stride;
        for (int64_t column = 0; column < columns; column += WIDTH) {
            const int64_t count = columns - column;
            Floats value = get(call.x, row * call.x.stride + column, count);
            if (call.x_bias.data)
                value += get(call.x_bias, column, count);
            if (call.dropout.seed) {
                if (column % DRAWN == 0)
                    draw(call.dropout, row, 0, column, outcomes);
                value = drop(call.dropout, outcomes + column % DRAWN, value);
            }
            if (call.has_residual) {
                value += get(call.residual, row * call.residual.stride + column, count);
                set(call.h, h_row + column, value, count);
                if (call.h.narrow)
                    value = rounded(value);
            }
            value = inside(value, count);
            total += call.mean ? value : value * value;
        }
        float average = 0.0f, squares = sum(total);
        if (call.mean) {
            average = squares / static_cast<float>(columns);
            total = Floats{};
            for (int64_t column = 0; column < columns; column += WIDTH) {
                const Floats centred =
                    inside(get(call.h, h_row + column, columns - column) - average, columns - column);
                total += centred * centred;
            }
            squares = sum(total);
            call.mean[row] = average;
        }
        const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(columns) + call.eps);
        call.rstd[row] = inverse;
        for (int64_t column = 0; column < columns; column += WIDTH) {
            const int64_t count = columns - column;
            Floats result = (get(call.h, h_row + column, count) - average) * inverse;
            if (call.round_first && (call.h.narrow || call.y.narrow))
                result = rounded(result);
            if (call.weight.data)
                result *= get(call.weight, column, count) + call.weight_offset;
            if (call.bias.data)
                result += get(call.bias, column, count);
            set(call.y, row * call.y.stride + column, result, count);
        }
    }
}

void norm_backward(const NormBackward& call, int64_t first_block, int64_t last_block) {
    const int64_t columns = call.columns;
    const Floats one = broadcast(1.0f);
    uint16_t outcomes[DRAWN];
    for (int64_t block = first_block; block < last_block; ++block) {
        float* sums = call.sums ? call.sums + block * 3 * columns : nullptr;
        for (int64_t i = 0; sums && i < 3 * columns; ++i)
            sums[i] = 0.0f;
        const int64_t end = (block + 1) * call.block_rows;
        for (int64_t row = block * call.block_rows; row < (end < call.rows ? end : call.rows); ++row) {
            const float average = call.mean ? call.mean[row] : 0.0f, inverse = call.rstd[row];
            const int64_t dy_row = row * call.dy.stride, h_row = row * call.h.stride;
            Floats g_total{}, gz_total{};
            for (int64_t column = 0; column < columns; column += WIDTH) {
                const int64_t count = columns - column;
                const Floats weight = call.weight.data ? get(call.weight, column, count) + call.weight_offset : one;
                const Floats g = get(call.dy, dy_row + column, count) * weight;
                g_total += g;
                gz_total += g * ((get(call.h, h_row + column, count) - average) * inverse);
            }
            const float g_mean = call.mean ? sum(g_total) / static_cast<float>(columns) : 0.0f;
            const float gz_mean = sum(gz_total) / static_cast<float>(columns);
            for (int64_t column = 0; column < columns; column += WIDTH) {
                const int64_t count = columns - column;
                const Floats weight = call.weight.data ? get(call.weight, column, count) + call.weight_offset : one;
                const Floats dy = get(call.dy, dy_row + column, count);
                const Floats z = (get(call.h, h_row + column, count) - average) * inverse;
                Floats gradient = (dy * weight - (g_mean + z * gz_mean)) * inverse;
                if (call.dh.data)
                    gradient += get(call.dh, row * call.dh.stride + column, count);
                if (call.dresidual.data)
                    set(call.dresidual, row * columns + column, gradient, count);
                if (call.dropout.seed) {
                    if (column % DRAWN == 0)
                        draw(call.dropout, row, 0, column, outcomes);
                    gradient = drop(call.dropout, outcomes + column % DRAWN, gradient);
                }
                if (call.dx.data)
                    set(call.dx, row * columns + column, gradient, count);
                if (sums) {
                    float* sum = sums + column;
                    store(sum, load(sum, count) + dy * z, count);
                    store(sum + columns, load(sum + columns, count) + dy, count);
                    store(sum + 2 * columns, load(sum + 2 * columns, count) + gradient, count);
                }
            }
        }
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/rows.h"

namespace tfm {

namespace {

std::tuple<Tensor, MaybeTensor, Tensor> residual_norm(Tensor x, MaybeTensor x_bias, MaybeTensor residual,
                                                      MaybeTensor weight, MaybeTensor bias, MaybeTensor seed,
                                                      double eps, double dropout_p, int64_t site, bool centred,
                                                      double weight_offset, bool round_first, MaybeType out_dtype) {
    const ScalarType stored = residual ? promote(x.scalar_type(), residual->scalar_type()) : x.scalar_type();
    const Rows x_rows(x), residual_rows(residual ? *residual : x);
    const Vector x_biases(x_bias), weights(weight), biases(bias);
    const int64_t rows = x_rows.rows;
    Tensor y = empty(shape_of(x), out_dtype.value_or(stored), x);
    MaybeTensor h;
    if (residual)
        h = empty(shape_of(x), stored, x);
    Tensor statistics = empty({centred ? 2 : 1, rows}, ScalarType::Float, x);
    float* const means = static_cast<float*>(statistics.data_ptr());
    const NormForward call{
        .x = matrix(x_rows),
        .residual = matrix(residual_rows),
        .y = matrix(Rows(y)),
        .h = h ? matrix(Rows(*h)) : matrix(x_rows),
        .x_bias = matrix(x_biases),
        .weight = matrix(weights),
        .bias = matrix(biases),
        .mean = centred ? means : nullptr,
        .rstd = centred ? means + rows : means,
        .columns = x_rows.columns,
        .eps = static_cast<float>(eps),
        .weight_offset = static_cast<float>(weight_offset),
        .has_residual = residual.has_value(),
        .round_first = round_first,
        .dropout = dropout_of(seed, dropout_p, site),
    };
    for_rows(rows, x_rows.columns, [&](int64_t begin, int64_t end) { TFM_RUN(norm_forward, call, begin, end); });
    return {y, h, statistics};
}

using Gradients = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

Gradients residual_norm_backward(Tensor dy, MaybeTensor dh, Tensor h, Tensor statistics, MaybeTensor weight,
                                 MaybeTensor seed, double dropout_p, int64_t site, double weight_offset, MaybeType dx,
                                 MaybeType dx_bias, MaybeType dresidual, MaybeType dweight, MaybeType dbias) {
    const Rows dy_rows(dy), h_rows(h), dh_rows(dh ? *dh : dy);
    const Vector weights(weight);
    const int64_t rows = statistics.size(1), columns = h_rows.columns;
    const auto output = [&](MaybeType type, std::vector<int64_t> shape) {
        return type ? MaybeTensor(empty(shape, *type, h)) : MaybeTensor();
    };
    const Gradients gradients{output(dx, shape_of(h)), output(dx_bias, {columns}), output(dresidual, shape_of(h)),
                              output(dweight, {columns}), output(dbias, {columns})};
    const auto& [d_x, d_x_bias, d_residual, d_weight, d_bias] = gradients;
    const RowBlocks blocks(rows);
    MaybeTensor sums;
    if (d_weight || d_bias || d_x_bias)
        sums = empty({blocks.count, 3, columns}, ScalarType::Float, h);
    const float* const means = static_cast<const float*>(statistics.const_data_ptr());
    const bool centred = statistics.size(0) == 2;
    const NormBackward call{
        .dy = matrix(dy_rows),
        .dh = dh ? matrix(dh_rows) : Matrix{},
        .h = matrix(h_rows),
        .dx = d_x ? matrix(Rows(*d_x)) : Matrix{},
        .dresidual = d_residual ? matrix(Rows(*d_residual)) : Matrix{},
        .weight = matrix(weights),
        .mean = centred ? means : nullptr,
        .rstd = centred ? means + rows : means,
        .sums = data_of<float>(sums),
        .rows = rows,
        .columns = columns,
        .block_rows = blocks.rows,
        .weight_offset = static_cast<float>(weight_offset),
        .dropout = dropout_of(seed, dropout_p, site),
    };
    for_rows(blocks.count, blocks.rows * columns,
             [&](int64_t begin, int64_t end) { TFM_RUN(norm_backward, call, begin, end); });
    if (sums)
        sum_blocks(*sums, {d_weight, d_bias, d_x_bias});
    return gradients;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    m.impl("residual_norm", TORCH_BOX(&residual_norm));
    m.impl("residual_norm_backward", TORCH_BOX(&residual_norm_backward));
}

} // namespace tfm

#endif
