// A linear layer with activation, gate and dropout: torch's product, then what kernels/feed_forward/elementwise.py
// writes of its elements, forward and backward, in one kernel each.
//
//     hidden = mask · f(a) / (1 - p)        hidden = mask · f(g) · u / (1 - p)
//     da = e · f'(a)                        dg = e · u · f'(g)        du = e · f(g)        e = mask · dhidden / (1 - p)
//
// The bias is added by the product, whose library does so at no cost, so that the pre-activation that is saved has been
// rounded once. Where it need not be saved, hidden takes its place in memory.
//
// A block is a strip of up to 256 columns; a thread takes eight columns of a row, one Philox draw. Bytes an element in
// bf16: forward 4 (gated 6), backward 8 with hidden (gated 12). Backward, a block goes down its rows and leaves one
// partial sum a column of the bias's gradient; a second kernel adds them up in order.
//
// Why it exists beside Triton's: a call costs less before its kernel starts. On a Xeon, launches left out but the
// products of a few rows included, linear_activation takes 8 µs of the host's time and its backward 11; the Triton
// twins, on the library's product, take 20 and 22, and an element-wise launch costs 6-13 µs there instead of 2.
// Predicted for an H200 outside a graph, 256 rows of 2,048 hidden columns in bf16: 4 µs of the host's time for the
// element-wise part, instead of 20. At 8,192 rows both move the same bytes, 67 MB in 17 µs forward, 134 MB in 33
// backward, where exact GELU's arithmetic, some 45 instructions an element, takes about as long as its bytes.
#include "common/linear.h"
#include "cuda/activations.cuh"
#include "cuda/dropout.cuh"
#include "cuda/sums.cuh"
#include "operators/feed_forward.h"

namespace tfm::cuda {
namespace {

constexpr int THREADS = 256;

struct Call {
    Matrix pre, hidden;           // pre: what was saved, in the backward; hidden may be absent there
    Matrix dhidden{}, dpre{};     // of the backward
    float* partials = nullptr;    // [row blocks, columns], null where no gradient of a bias is wanted
    int64_t rows, block_rows = 0; // block_rows: of the backward
    int columns;
    bool gated, keeps_hidden = false; // keeps_hidden: of ReLU without a gate, hidden itself was saved
    Activation activation;
    Dropout dropout;
};

// Blocks [lanes, rows] over strips of columns and blocks of rows.
struct Strips {
    int lanes = 1, count;

    explicit Strips(int64_t columns) {
        const int64_t octets = divide_up<int64_t>(columns, 8);
        while (lanes < WARP && lanes < octets)
            lanes *= 2;
        count = static_cast<int>(divide_up<int64_t>(octets, lanes));
    }

    dim3 block() const { return dim3(lanes, THREADS / lanes); }
    dim3 grid(int64_t row_blocks) const { return dim3(static_cast<unsigned>(row_blocks), count); }
};

template <class Access>
__global__ void __launch_bounds__(THREADS) activation_dropout_kernel(const Call call) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x), left = call.columns - column;
    if (row >= call.rows || left <= 0)
        return;
    const int64_t place = row * call.pre.stride + column;
    Octet value = Access::load(call.pre, place, left), up;
    if (call.gated)
        up = Access::load(call.pre, place + call.columns, left);
    with_activation(call.activation, [&](auto activation) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            value[i] = activate<decltype(activation)::value>(value[i]).value;
    });
    if (call.gated) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            value[i] *= up[i];
    }
    if (call.dropout.seed)
        Keep(call.dropout, row, column / 8, *call.dropout.seed).apply(value);
    Access::store(call.hidden, row * call.columns + column, value, left);
}

// Stores eight columns of dpre, and of hidden where wanted; returns da or dg in fp32.
template <class Access>
__device__ Octet store_gradient(const Call& call, int64_t row, int column, int64_t seed) {
    const int left = call.columns - column;
    const int64_t place = row * call.pre.stride + column, to = row * call.dpre.stride + column;
    Octet gradient = Access::load(call.dhidden, row * call.dhidden.stride + column, left);
    const Octet saved = Access::load(call.pre, place, left);
    if (call.keeps_hidden) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            gradient[i] = saved[i] <= 0.0f ? 0.0f : gradient[i] * call.dropout.scale;
        Access::store(call.dpre, to, gradient, left);
        return gradient;
    }
    Octet value, slope, up;
    if (call.gated)
        up = Access::load(call.pre, place + call.columns, left);
    with_activation(call.activation, [&](auto activation) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const Activated activated = activate<decltype(activation)::value>(saved[i]);
            value[i] = activated.value;
            slope[i] = activated.slope;
        }
    });
    Octet hidden = value;
    if (call.gated) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            hidden[i] *= up[i];
    }
    if (call.dropout.seed) {
        const Keep keep(call.dropout, row, column / 8, seed);
        keep.apply(gradient);
        keep.apply(hidden);
    }
    if (call.hidden.data)
        Access::store(call.hidden, row * call.columns + column, hidden, left);
    if (call.gated) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            value[i] *= gradient[i];
            gradient[i] *= up[i];
        }
        Access::store(call.dpre, to + call.columns, value, left);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        gradient[i] *= slope[i];
    Access::store(call.dpre, to, gradient, left);
    return gradient;
}

template <class Access>
__global__ void __launch_bounds__(THREADS) activation_dropout_backward_kernel(const Call call) {
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * call.block_rows;
    const int64_t end = first_row + call.block_rows, last_row = end < call.rows ? end : call.rows;
    const int width = 8 * blockDim.x, first_column = width * blockIdx.y, column = first_column + 8 * threadIdx.x;
    const int64_t seed = seed_of(call.dropout);
    Octet sums{};
    if (column < call.columns)
        for (int64_t row = first_row + threadIdx.y; row < last_row; row += blockDim.y) {
            const Octet gradient = store_gradient<Access>(call, row, column, seed);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                sums[i] += gradient[i];
        }
    if (!call.partials)
        return;
    // One sum for each of the block's rows of threads, added up in order.
    float* const rows_sums = shared_memory<float>();
    store_vectors(rows_sums + threadIdx.y * width + 8 * threadIdx.x, sums);
    __syncthreads();
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    if (thread >= width || first_column + thread >= call.columns)
        return;
    float total = 0.0f;
    for (int other = 0; other < static_cast<int>(blockDim.y); ++other)
        total += rows_sums[other * width + thread];
    call.partials[static_cast<int64_t>(blockIdx.x) * call.columns + first_column + thread] = total;
}

bool keeps_hidden(bool gated, const std::string& activation) { return !gated && activation == "relu"; }

// Fills hidden, which may be pre itself.
void fill(const Tensor& pre, const Tensor& hidden, bool gated, const std::string& activation, double dropout_p,
          const MaybeTensor& seed, int64_t site, const OnDevice& device) {
    const Rows pre_rows(pre), hidden_rows(hidden);
    const Strips strips(hidden_rows.columns);
    const Call call{
        .pre = matrix(pre_rows),
        .hidden = matrix(hidden_rows),
        .rows = hidden_rows.rows,
        .columns = static_cast<int>(hidden_rows.columns),
        .gated = gated,
        .activation = activation_of(activation),
        .dropout = dropout_of(seed, dropout_p, site),
    };
    if (call.rows == 0)
        return;
    const dim3 block = strips.block(), grid = strips.grid(divide_up<int64_t>(call.rows, block.y));
    with_access(call.columns, {call.pre, call.hidden}, {}, [&](auto way) {
        launch(activation_dropout_kernel<decltype(way)>, grid, block, 0, device.stream, call);
    });
}

Tensor activation_dropout(const arguments::ActivationDropout& a) {
    const OnDevice device(a.pre);
    Tensor hidden = empty({a.pre.size(0), a.gated ? a.pre.size(1) / 2 : a.pre.size(1)}, a.pre.scalar_type(), a.pre);
    fill(a.pre, hidden, a.gated, a.activation, a.dropout_p, a.seed, a.site, device);
    return hidden;
}

std::tuple<Tensor, Tensor> linear_activation(const arguments::LinearActivation& a) {
    STD_TORCH_CHECK(!(a.bias && a.up_weight), "expected no bias beside an up_weight");
    const OnDevice device(a.x);
    const Tensor pre = a.up_weight ? gate_and_up(a.x, a.weight, *a.up_weight) : linear(a.x, a.weight, a.bias);
    const bool kept = a.save && !keeps_hidden(a.gated, a.activation);
    const int64_t columns = a.gated ? pre.size(1) / 2 : pre.size(1);
    const Tensor hidden = kept || a.gated ? empty({pre.size(0), columns}, a.x.scalar_type(), a.x) : pre;
    fill(pre, hidden, a.gated, a.activation, a.dropout_p, a.seed, a.site, device);
    return {hidden, kept ? pre : empty({0}, a.x.scalar_type(), a.x)};
}

// The gradients, of a call of either backward.
template <class Arguments>
std::tuple<Tensor, MaybeTensor, MaybeTensor> gradients(const Arguments& a, const Tensor& dhidden,
                                                       const OnDevice& device) {
    const Rows dhidden_rows(dhidden), saved_rows(a.saved);
    const int64_t rows = dhidden_rows.rows, columns = dhidden_rows.columns;
    const Tensor dpre = empty(shape_of(a.saved), a.saved.scalar_type(), a.saved);
    MaybeTensor hidden, sums, partials;
    if (a.recompute)
        hidden = empty({rows, columns}, a.saved.scalar_type(), a.saved);
    const Strips strips(columns);
    const dim3 block = strips.block();
    int64_t row_blocks = divide_up<int64_t>(rows, block.y);
    if (a.dbias) {
        sums = empty({columns}, *a.dbias, a.saved);
        // Eight blocks a multiprocessor: few partial sums, and still enough loads under way.
        row_blocks = std::min<int64_t>(row_blocks, divide_up(8 * device.multiprocessors, strips.count));
        partials = empty({row_blocks, 1, columns}, ScalarType::Float, a.saved);
    }
    const Call call{
        .pre = matrix(saved_rows),
        .hidden = hidden ? matrix(Rows(*hidden)) : Matrix{},
        .dhidden = matrix(dhidden_rows),
        .dpre = matrix(Rows(dpre)),
        .partials = data_of<float>(partials),
        .rows = rows,
        .block_rows = row_blocks > 0 ? divide_up(rows, row_blocks) : 0,
        .columns = static_cast<int>(columns),
        .gated = a.gated,
        .keeps_hidden = keeps_hidden(a.gated, a.activation),
        .activation = activation_of(a.activation),
        .dropout = dropout_of(a.seed, a.dropout_p, a.site),
    };
    if (rows > 0)
        with_access(columns, {call.pre, call.dhidden, call.dpre, call.hidden}, {}, [&](auto way) {
            launch(activation_dropout_backward_kernel<decltype(way)>, strips.grid(row_blocks), block,
                   a.dbias ? THREADS * sizeof(Octet) : 0, device.stream, call);
        });
    if (sums)
        sum_partials(*partials, {sums}, device);
    return {dpre, hidden, sums};
}

std::tuple<Tensor, MaybeTensor, MaybeTensor>
activation_dropout_backward(const arguments::ActivationDropoutBackward& a) {
    return gradients(a, a.dhidden, OnDevice(a.saved));
}

std::tuple<Tensor, MaybeTensor, MaybeTensor> linear_activation_backward(const arguments::LinearActivationBackward& a) {
    const OnDevice device(a.saved);
    return gradients(a, torch::stable::matmul(a.dy, a.weight), device);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, TFM_CUDA_KEY, m) {
    implement<arguments::ActivationDropout, activation_dropout>(m);
    implement<arguments::ActivationDropoutBackward, activation_dropout_backward>(m);
    implement<arguments::LinearActivation, linear_activation>(m);
    implement<arguments::LinearActivationBackward, linear_activation_backward>(m);
}

} // namespace tfm::cuda
