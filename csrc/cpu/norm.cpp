// LayerNorm and RMSNorm behind a bias, dropout and a residual connection: the formulas of kernels/norm.py.
//
// A row goes through three short passes while it lies in the first-level cache: h is formed, stored and summed; its
// squared deviations are summed; y is written. The backward needs two: the sums of g and g z, then every gradient. They
// see whole vectors of fp32: rows of bf16, or of an odd width, are copied to scratch memory on their way in and out.
// Rows are shared among threads. The parameters' gradients are sums over rows: each block of rows, whose size the
// number of rows alone decides, adds up its own, and the blocks are added in their order, so that the bits are the same
// on any number of threads.
#include "cpu/isa.h"

#include "common/philox.h"
#include "cpu/matrix.h"

namespace tfm {

struct NormForward {
    Matrix x, residual, y, h;            // h: x itself where there is no residual
    const float *x_bias, *weight, *bias; // in whole vectors: 0, 1 and 0 where there is none
    float* mean;                         // null: RMSNorm
    float* rstd;
    int64_t columns;
    float eps;
    bool has_residual, round_first;
    Dropout dropout;
};

struct NormBackward {
    Matrix dy, dh, h, dx, dresidual; // without data: none
    const float* weight;
    const float* mean;
    const float* rstd;
    float* sums; // [blocks, 3, padded columns]: of dweight, dbias and dx_bias; null where none is wanted
    int64_t rows, columns, block_rows;
    Dropout dropout;
};

// `scratch` has room for 4 and for 5 rows of whole vectors.
TFM_KERNEL(norm_forward, const NormForward& call, float* scratch, int64_t first_row, int64_t last_row)
TFM_KERNEL(norm_backward, const NormBackward& call, float* scratch, int64_t first_block, int64_t last_block)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/dropout.h"

namespace tfm::TFM_ISA {

// The squares of the deviations from `average`, added up.
TFM_INLINE float squares_of(const float* h, int64_t columns, float average) {
    Floats total{};
    int64_t column = 0;
    for (; column + WIDTH <= columns; column += WIDTH) {
        const Floats centred = load(h + column) - average;
        total += centred * centred;
    }
    if (column < columns) {
        const Floats centred = inside(load(h + column) - average, columns - column);
        total += centred * centred;
    }
    return sum(total);
}

void norm_forward(const NormForward& call, float* scratch, int64_t first_row, int64_t last_row) {
    const int64_t columns = call.columns, width = (columns + WIDTH - 1) / WIDTH * WIDTH;
    uint16_t outcomes[DRAWN];
    for (int64_t row = first_row; row < last_row; ++row) {
        const float* const x = read_row(call.x, row, columns, scratch);
        const float* h = x;
        Floats total{};
        if (call.has_residual) {
            const float* const residual = read_row(call.residual, row, columns, scratch + width);
            float* const sums = row_to_write(call.h, row, columns, scratch + 2 * width);
            for (int64_t column = 0; column < width; column += WIDTH) {
                Floats value = load(x + column) + load(call.x_bias + column);
                value = drop_next(call.dropout, row, column, outcomes, value);
                value += load(residual + column);
                if (call.h.narrow)
                    value = rounded(value);
                store(sums + column, value);
                total += value;
            }
            write_row(call.h, row, columns, sums);
            h = sums;
        } else if (call.mean) {
            for (int64_t column = 0; column < width; column += WIDTH)
                total += load(h + column);
        }
        float average = 0.0f;
        if (call.mean) {
            average = sum(total) / static_cast<float>(columns);
            call.mean[row] = average;
        }
        const float variance = squares_of(h, columns, average) / static_cast<float>(columns);
        const float inverse = 1.0f / __builtin_sqrtf(variance + call.eps);
        call.rstd[row] = inverse;
        const bool rounds = call.round_first && (call.h.narrow || call.y.narrow);
        float* const y = row_to_write(call.y, row, columns, scratch + 3 * width);
        for (int64_t column = 0; column < width; column += WIDTH) {
            Floats result = (load(h + column) - average) * inverse;
            if (rounds)
                result = rounded(result);
            store(y + column, result * load(call.weight + column) + load(call.bias + column));
        }
        write_row(call.y, row, columns, y);
    }
}

void norm_backward(const NormBackward& call, float* scratch, int64_t first_block, int64_t last_block) {
    const int64_t columns = call.columns, width = (columns + WIDTH - 1) / WIDTH * WIDTH;
    uint16_t outcomes[DRAWN];
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t stride = padded(columns);
        float* const sums = call.sums ? call.sums + block * 3 * stride : nullptr;
        if (sums)
            __builtin_memset(sums, 0, 3 * stride * sizeof(float));
        const int64_t end = (block + 1) * call.block_rows;
        for (int64_t row = block * call.block_rows; row < (end < call.rows ? end : call.rows); ++row) {
            const float average = call.mean ? call.mean[row] : 0.0f, inverse = call.rstd[row];
            const float* const dy = read_row(call.dy, row, columns, scratch);
            const float* const h = read_row(call.h, row, columns, scratch + width);
            Floats g_total{}, gz_total{};
            for (int64_t column = 0; column < width; column += WIDTH) {
                const Floats g = load(dy + column) * load(call.weight + column);
                g_total += g;
                gz_total += g * ((load(h + column) - average) * inverse);
            }
            const float g_mean = call.mean ? sum(g_total) / static_cast<float>(columns) : 0.0f;
            const float gz_mean = sum(gz_total) / static_cast<float>(columns);
            const float* const dh = call.dh.data ? read_row(call.dh, row, columns, scratch + 2 * width) : nullptr;
            float* const dresidual = row_to_write(call.dresidual, row, columns, scratch + 3 * width);
            float* const dx = row_to_write(call.dx, row, columns, scratch + 4 * width);
            for (int64_t column = 0; column < width; column += WIDTH) {
                const Floats d_y = load(dy + column), z = (load(h + column) - average) * inverse;
                Floats gradient = (d_y * load(call.weight + column) - (g_mean + z * gz_mean)) * inverse;
                if (dh)
                    gradient += load(dh + column);
                if (call.dresidual.data)
                    store(dresidual + column, gradient);
                gradient = drop_next(call.dropout, row, column, outcomes, gradient);
                if (call.dx.data)
                    store(dx + column, gradient);
                if (sums) {
                    float* const sum = sums + column;
                    store(sum, load(sum) + d_y * z);
                    store(sum + stride, load(sum + stride) + d_y);
                    store(sum + 2 * stride, load(sum + 2 * stride) + gradient);
                }
            }
            if (call.dresidual.data)
                write_row(call.dresidual, row, columns, dresidual);
            if (call.dx.data)
                write_row(call.dx, row, columns, dx);
        }
    }
}

} // namespace tfm::TFM_ISA

#else

#include "common/norm.h"
#include "cpu/rows.h"

namespace tfm {

namespace {

// offset + x in fp32 and whole vectors, `absent` where there is no x.
std::vector<float> parameters(const MaybeTensor& x, int64_t columns, float absent, double offset) {
    std::vector<float> result = x ? numbers_of<float>(*x) : std::vector<float>();
    for (float& number : result)
        number += static_cast<float>(offset);
    result.resize(padded(columns), absent);
    return result;
}

NormResults residual_norm(const arguments::ResidualNorm& a) {
    const Rows x_rows(a.x), residual_rows(a.residual ? *a.residual : a.x);
    const int64_t rows = x_rows.rows, columns = x_rows.columns;
    const std::vector<float> x_biases = parameters(a.x_bias, columns, 0, 0), biases = parameters(a.bias, columns, 0, 0);
    const std::vector<float> weights = parameters(a.weight, columns, 1, a.weight_offset);
    const NormResults results = norm_results(a, rows);
    const auto& [y, h, statistics] = results;
    float* const means = static_cast<float*>(statistics.data_ptr());
    const NormForward call{
        .x = matrix(x_rows),
        .residual = matrix(residual_rows),
        .y = matrix(Rows(y)),
        .h = h ? matrix(Rows(*h)) : matrix(x_rows),
        .x_bias = x_biases.data(),
        .weight = weights.data(),
        .bias = biases.data(),
        .mean = a.centred ? means : nullptr,
        .rstd = a.centred ? means + rows : means,
        .columns = columns,
        .eps = static_cast<float>(a.eps),
        .has_residual = a.residual.has_value(),
        .round_first = a.round_first,
        .dropout = dropout_of(a.seed, a.dropout_p, a.site),
    };
    for_rows(rows, columns, [&](int64_t begin, int64_t end) {
        const Scratch scratch(4, columns);
        TFM_RUN(norm_forward, call, scratch.memory.get(), begin, end);
    });
    return results;
}

NormGradients residual_norm_backward(const arguments::ResidualNormBackward& a) {
    const Rows dy_rows(a.dy), h_rows(a.h), dh_rows(a.dh ? *a.dh : a.dy);
    const int64_t rows = a.statistics.size(1), columns = h_rows.columns;
    const std::vector<float> weights = parameters(a.weight, columns, 1, a.weight_offset);
    const NormGradients gradients = norm_gradients(a, columns);
    const auto& [d_x, d_x_bias, d_residual, d_weight, d_bias] = gradients;
    const RowBlocks blocks(rows);
    MaybeTensor sums;
    if (d_weight || d_bias || d_x_bias)
        sums = empty({blocks.count, 3, padded(columns)}, ScalarType::Float, a.h);
    const float* const means = static_cast<const float*>(a.statistics.const_data_ptr());
    const bool centred = a.statistics.size(0) == 2;
    const NormBackward call{
        .dy = matrix(dy_rows),
        .dh = a.dh ? matrix(dh_rows) : Matrix{},
        .h = matrix(h_rows),
        .dx = d_x ? matrix(Rows(*d_x)) : Matrix{},
        .dresidual = d_residual ? matrix(Rows(*d_residual)) : Matrix{},
        .weight = weights.data(),
        .mean = centred ? means : nullptr,
        .rstd = centred ? means + rows : means,
        .sums = data_of<float>(sums),
        .rows = rows,
        .columns = columns,
        .block_rows = blocks.rows,
        .dropout = dropout_of(a.seed, a.dropout_p, a.site),
    };
    for_rows(blocks.count, blocks.rows * columns, [&](int64_t begin, int64_t end) {
        const Scratch scratch(5, columns);
        TFM_RUN(norm_backward, call, scratch.memory.get(), begin, end);
    });
    if (sums)
        sum_blocks(*sums, {d_weight, d_bias, d_x_bias});
    return gradients;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::ResidualNorm, residual_norm>(m);
    implement<arguments::ResidualNormBackward, residual_norm_backward>(m);
}

} // namespace tfm

#endif
