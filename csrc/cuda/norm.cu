// LayerNorm and RMSNorm behind a bias, dropout and a residual connection: the formulas of kernels/norm.py.
//
// Bytes: forward reads x and residual and writes h and y, backward reads dy, h and dh and writes dx and dresidual, each
// once; statistics and parameters are small beside them. Both are bound by memory where rows are many, by the launch
// where they are few.
//
// Forward: a warp keeps a row of up to 1,024 columns in registers, 8, 16 or 32 of them a lane, and sums by shuffles
// alone; four rows a block. Up to 8,192 columns a block's warps are one team that keeps 16 a lane. Beyond, the block
// reads h again, which the second-level cache still holds.
//
// Backward: beside dy and z a lane keeps the sums of three parameters' gradients for its columns, so it takes 16
// columns at most: one warp a row up to 512 columns, a team of warps above. Blocks are two a multiprocessor, 8 warps
// each, which have 32 KB of loads under way at once; each strides over the rows and leaves one partial sum a column,
// which a second kernel adds up in order.
//
// Why it exists beside Triton's: a call costs less before its kernel starts. On a Xeon, launches left out, the operator
// takes 8 µs of the host's time forward and 12 backward with every gradient, 3 of them for torch's dispatch of so many
// arguments; the Triton twin takes 28 and 33, and its launches cost more, 6-13 µs instead of 2. Predicted for an H200
// outside a graph, 1,024 rows of 512 in bf16: 10 µs forward and 16 backward, instead of 37 and 53, though the kernels
// themselves take 2 and 4. At 8,192 rows of 1,024 both move the same bytes, at 4.0 TB/s 17 µs and 21, the backward's
// small sum 3 more: only the host's time is won there, and inside a graph nothing at all.
#include "common/norm.h"
#include "cuda/norm_backward.cuh"
#include "cuda/norm_forward.cuh"

namespace tfm::cuda {
namespace {

constexpr int64_t LONGEST_KEPT_ROW = 8192, LONGEST_KEPT_GRADIENT = 4096;

NormResults residual_norm(const arguments::ResidualNorm& a) {
    const OnDevice device(a.x);
    const Rows x_rows(a.x), residual_rows(a.residual ? *a.residual : a.x);
    const Vector x_biases(a.x_bias), weights(a.weight), biases(a.bias);
    const int64_t rows = x_rows.rows, columns = x_rows.columns;
    const NormResults results = norm_results(a, rows);
    const auto& [y, h, statistics] = results;
    float* const means = static_cast<float*>(statistics.data_ptr());
    const Matrix h_rows = h ? matrix(Rows(*h)) : matrix(x_rows), y_rows = matrix(Rows(y));
    NormForward call{
        .x = matrix(x_rows),
        .residual = a.residual ? matrix(residual_rows) : Matrix{},
        .y = y_rows,
        .h = h_rows,
        .x_bias = matrix(x_biases),
        .weight = matrix(weights),
        .bias = matrix(biases),
        .mean = a.centred ? means : nullptr,
        .rstd = a.centred ? means + rows : means,
        .rows = rows,
        .columns = static_cast<int>(columns),
        .team_warps = 1,
        .eps = static_cast<float>(a.eps),
        .weight_offset = static_cast<float>(a.weight_offset),
        .rounding = !a.round_first                                                 ? Width::FLOAT
                    : h_rows.width == Width::FLOAT && y_rows.width != Width::FLOAT ? y_rows.width
                                                                                   : h_rows.width,
        .dropout = dropout_of(a.seed, a.dropout_p, a.site),
    };
    if (rows == 0)
        return results;
    const auto run = [&](auto kernel, int threads) {
        const int64_t blocks = divide_up<int64_t>(rows, threads / WARP / call.team_warps);
        launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), Team::bytes(threads), device.stream, call);
    };
    with_access(columns, {call.h, call.x, call.residual, call.y}, {call.x_bias, call.weight, call.bias}, [&](auto way) {
        using Access = decltype(way);
        if (columns <= 256) {
            run(norm_forward_kernel<Access, 1>, 128);
        } else if (columns <= 512) {
            run(norm_forward_kernel<Access, 2>, 128);
        } else if (columns <= 1024) {
            run(norm_forward_kernel<Access, 4>, 128);
        } else if (columns <= LONGEST_KEPT_ROW) {
            call.team_warps = static_cast<int>(divide_up<int64_t>(columns, 16 * WARP));
            run(norm_forward_kernel<Access, 2>, WARP * call.team_warps);
        } else {
            call.team_warps = 16;
            run(long_norm_forward_kernel<Access>, 512);
        }
    });
    return results;
}

NormGradients residual_norm_backward(const arguments::ResidualNormBackward& a) {
    const OnDevice device(a.h);
    const Rows dy_rows(a.dy), h_rows(a.h), dh_rows(a.dh ? *a.dh : a.dy);
    const Vector weights(a.weight);
    const int64_t rows = a.statistics.size(1), columns = h_rows.columns;
    const NormGradients gradients = norm_gradients(a, columns);
    const auto& [d_x, d_x_bias, d_residual, d_weight, d_bias] = gradients;

    // Eight or sixteen columns a lane, as many warps as the row then takes, as many rows as make a block of 8 warps.
    const bool kept = columns <= LONGEST_KEPT_GRADIENT;
    const int octets = columns <= 256 ? 1 : 2;
    const int team_warps = kept ? static_cast<int>(divide_up<int64_t>(columns, 8 * octets * WARP)) : 16;
    const int teams = std::max(1, 8 / team_warps), threads = WARP * team_warps * teams;
    const int blocks = static_cast<int>(std::min<int64_t>(divide_up<int64_t>(rows, teams), 2 * device.multiprocessors));

    MaybeTensor partials;
    const int parts = d_bias.has_value() + d_x_bias.has_value() + d_weight.has_value();
    if (parts > 0)
        partials = empty({blocks, parts, columns}, ScalarType::Float, a.h);
    float* const means = static_cast<float*>(a.statistics.data_ptr());
    const bool centred = a.statistics.size(0) == 2;
    const NormBackward call{
        .dy = matrix(dy_rows),
        .dh = a.dh ? matrix(dh_rows) : Matrix{},
        .h = matrix(h_rows),
        .dx = d_x ? matrix(Rows(*d_x)) : Matrix{},
        .dresidual = d_residual ? matrix(Rows(*d_residual)) : Matrix{},
        .weight = matrix(weights),
        .mean = centred ? means : nullptr,
        .rstd = centred ? means + rows : means,
        .partials = data_of<float>(partials),
        .rows = rows,
        .columns = static_cast<int>(columns),
        .team_warps = team_warps,
        .dbias = d_bias.has_value(),
        .dx_bias = d_x_bias.has_value(),
        .dweight = d_weight.has_value(),
        .weight_offset = static_cast<float>(a.weight_offset),
        .dropout = dropout_of(a.seed, a.dropout_p, a.site),
    };
    if (blocks > 0)
        with_access(columns, {call.h, call.dy, call.dh, call.dx, call.dresidual}, {call.weight}, [&](auto way) {
            using Access = decltype(way);
            const auto kernel = !kept         ? long_norm_backward_kernel<Access>
                                : octets == 1 ? norm_backward_kernel<Access, 1>
                                              : norm_backward_kernel<Access, 2>;
            const size_t sums_bytes = kept && parts > 0 ? threads * octets * sizeof(Octet) : 0;
            launch(kernel, dim3(blocks), dim3(threads), Team::bytes(threads) + sums_bytes, device.stream, call);
        });
    if (partials)
        sum_partials(*partials, {d_bias, d_x_bias, d_weight}, device);
    return gradients;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, TFM_CUDA_KEY, m) {
    implement<arguments::ResidualNorm, residual_norm>(m);
    implement<arguments::ResidualNormBackward, residual_norm_backward>(m);
}

} // namespace tfm::cuda
