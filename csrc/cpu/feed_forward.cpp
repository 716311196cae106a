// The hidden layer of a feed-forward network around torch's own products: the formulas of
// kernels/feed_forward/elementwise.py.
//
// Forward: torch multiplies x by the weight, and one pass goes over the product where it lies: bias, activation, gate
// and dropout. It leaves the pre-activation in place and hidden beside it, or hidden in place where nothing is kept.
// A bf16 product gets its bias from torch, before it is rounded: later it would turn signs, and with them ReLU's slope.
// Backward: torch multiplies dy by the second weight, and one pass turns that gradient of hidden into the one of the
// pre-activation, again in place; hidden, which the second weight's gradient needs, and the bias's gradient come out of
// it too. ReLU alone keeps its hidden, which tells what the mask and the derivative were: nothing is drawn again.
// Rows are shared among threads; the bias's gradient is summed as in norm.cpp.
#include "cpu/isa.h"

#include "common/philox.h"
#include "cpu/activations.h"
#include "cpu/matrix.h"

namespace tfm {

// Pre-activations are [rows, columns], gated ones [rows, 2 columns] with the gate first. All matrices are of one dtype.
struct HiddenForward {
    Matrix product, hidden; // hidden: the product itself where that is not kept
    const float* bias;      // null where the product has it
    int64_t columns;
    Activation activation;
    bool gated, keep; // keep: the product becomes the pre-activation
    Dropout dropout;
};

struct HiddenBackward {
    Matrix dhidden, saved, dpre, hidden; // dpre: dhidden itself without a gate; hidden: null where it is not wanted
    float* sums;                         // [blocks, columns]: of dpre; null where none is wanted
    int64_t rows, columns, block_rows;
    Activation activation;
    bool gated;
    Dropout dropout;
};

TFM_KERNEL(hidden_forward, const HiddenForward& call, int64_t first_row, int64_t last_row)
TFM_KERNEL(hidden_backward, const HiddenBackward& call, int64_t first_block, int64_t last_block)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/dropout.h"

namespace tfm::TFM_ISA {

// Where row `row` of a matrix of T begins.
template <class T>
TFM_INLINE T* row_of(const Matrix& m, int64_t row) {
    return static_cast<T*>(m.data) + row * m.stride;
}

// step(column, count) for every vector of a row; `count` is known to be WIDTH for all but the last.
template <class Step>
TFM_INLINE void for_vectors(int64_t columns, const Step& step) {
    int64_t column = 0;
    for (; column + WIDTH <= columns; column += WIDTH)
        step(column, WIDTH);
    if (column < columns)
        step(column, columns - column);
}

// Takes its call by value: what it stores cannot change that, and the compiler may keep it in registers.
template <class T, Activation ACTIVATION>
void forward_rows(const HiddenForward call, int64_t first_row, int64_t last_row) {
    uint16_t outcomes[DRAWN];
    for (int64_t row = first_row; row < last_row; ++row) {
        T *const product = row_of<T>(call.product, row), *const hidden = row_of<T>(call.hidden, row);
        for_vectors(call.columns, [&](int64_t column, int64_t count) {
            Floats pre = load(product + column, count);
            if (call.bias) {
                pre += load(call.bias + column, count);
                if (call.keep)
                    store(product + column, pre, count);
            }
            Floats value = activate<ACTIVATION>(pre).value;
            if (call.gated)
                value *= load(product + call.columns + column, count);
            value = drop_next(call.dropout, row, column, outcomes, value);
            store(hidden + column, value, count);
        });
    }
}

template <class T, Activation ACTIVATION>
TFM_INLINE void backward_row(const HiddenBackward& call, int64_t row, float* sums) {
    const bool from_hidden = ACTIVATION == Activation::RELU && !call.gated;
    const T *const dhidden = row_of<T>(call.dhidden, row), *const saved = row_of<T>(call.saved, row);
    T *const dpre = row_of<T>(call.dpre, row), *const hidden = row_of<T>(call.hidden, row);
    uint16_t outcomes[DRAWN];
    for_vectors(call.columns, [&](int64_t column, int64_t count) {
        Floats gradient = load(dhidden + column, count);
        const Floats kept = load(saved + column, count);
        if (from_hidden) {
            gradient = kept <= 0.0f ? Floats{} : gradient * call.dropout.scale;
        } else {
            const Activated activated = activate<ACTIVATION>(kept);
            const Floats up = call.gated ? load(saved + call.columns + column, count) : broadcast(1.0f);
            Floats value = activated.value * up;
            if (call.dropout.seed) {
                if (column % DRAWN == 0)
                    draw(call.dropout, row, 0, column, outcomes);
                gradient = drop(call.dropout, outcomes + column % DRAWN, gradient);
                value = drop(call.dropout, outcomes + column % DRAWN, value);
            }
            if (call.hidden.data)
                store(hidden + column, value, count);
            if (call.gated)
                store(dpre + call.columns + column, gradient * activated.value, count);
            gradient *= up * activated.derivative;
        }
        store(dpre + column, gradient, count);
        if (sums)
            store(sums + column, load(sums + column, count) + gradient, count);
    });
}

template <class T, Activation ACTIVATION>
void backward_blocks(const HiddenBackward call, int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
        float* sums = call.sums ? call.sums + block * call.columns : nullptr;
        for (int64_t i = 0; sums && i < call.columns; ++i)
            sums[i] = 0.0f;
        const int64_t end = (block + 1) * call.block_rows;
        for (int64_t row = block * call.block_rows; row < (end < call.rows ? end : call.rows); ++row)
            backward_row<T, ACTIVATION>(call, row, sums);
    }
}

// function<T, activation>(call, first, last), dtype and activation known when it is compiled.
#define TFM_CASE(function, T, ACTIVATION)                                                                              \
    case Activation::ACTIVATION:                                                                                       \
        return function<T, Activation::ACTIVATION>(call, first, last)
#define TFM_FOR_ACTIVATION(function, T)                                                                                \
    switch (call.activation) {                                                                                         \
        TFM_CASE(function, T, RELU);                                                                                   \
        TFM_CASE(function, T, GELU);                                                                                   \
        TFM_CASE(function, T, GELU_TANH);                                                                              \
        TFM_CASE(function, T, SILU);                                                                                   \
        TFM_CASE(function, T, QUICK_GELU);                                                                             \
        TFM_CASE(function, T, RELU_SQUARED);                                                                           \
        TFM_CASE(function, T, SIGMOID);                                                                                \
        TFM_CASE(function, T, TANH);                                                                                   \
    }

void hidden_forward(const HiddenForward& call, int64_t first, int64_t last) {
    if (call.product.narrow)
        TFM_FOR_ACTIVATION(forward_rows, BFloat16)
    TFM_FOR_ACTIVATION(forward_rows, float)
}

void hidden_backward(const HiddenBackward& call, int64_t first, int64_t last) {
    if (call.saved.narrow)
        TFM_FOR_ACTIVATION(backward_blocks, BFloat16)
    TFM_FOR_ACTIVATION(backward_blocks, float)
}

} // namespace tfm::TFM_ISA

#else

#include "common/linear.h"
#include "cpu/rows.h"
#include "operators/feed_forward.h"

namespace tfm {

namespace {

void fill_hidden(const Tensor& product, const MaybeTensor& bias, const Tensor& hidden, bool keep, bool gated,
                 Activation activation, const Dropout& dropout) {
    const Rows product_rows(product);
    MaybeTensor biases;
    if (bias)
        biases = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
    const int64_t rows = hidden.size(0), columns = hidden.size(1);
    const HiddenForward call{
        .product = matrix(product_rows),
        .hidden = matrix(Rows(hidden)),
        .bias = data_of<float>(biases),
        .columns = columns,
        .activation = activation,
        .gated = gated,
        .keep = keep,
        .dropout = dropout,
    };
    for_rows(rows, columns, [&](int64_t begin, int64_t end) { TFM_RUN(hidden_forward, call, begin, end); });
}

Tensor activation_dropout(const arguments::ActivationDropout& a) {
    const int64_t columns = a.gated ? a.pre.size(1) / 2 : a.pre.size(1);
    Tensor hidden = empty({a.pre.size(0), columns}, a.pre.scalar_type(), a.pre);
    fill_hidden(a.pre, {}, hidden, true, a.gated, activation_of(a.activation), dropout_of(a.seed, a.dropout_p, a.site));
    return hidden;
}

std::tuple<Tensor, Tensor> linear_activation(const arguments::LinearActivation& a) {
    STD_TORCH_CHECK(!(a.gated && a.bias), "bias: expected None beside a gate, got a tensor");
    const Activation function = activation_of(a.activation);
    const bool keep = a.save && !(function == Activation::RELU && !a.gated);
    // Where the product does not, the pass after it adds the bias.
    MaybeTensor early_bias, late_bias;
    (a.x.scalar_type() == ScalarType::Float ? late_bias : early_bias) = a.bias;
    Tensor product = a.up_weight ? gate_and_up(a.x, a.weight, *a.up_weight) : linear(a.x, a.weight, early_bias);
    const int64_t columns = a.gated ? product.size(1) / 2 : product.size(1);
    Tensor hidden = keep || a.gated ? empty({product.size(0), columns}, a.x.scalar_type(), a.x) : product;
    fill_hidden(product, late_bias, hidden, keep, a.gated, function, dropout_of(a.seed, a.dropout_p, a.site));
    return {hidden, keep ? product : empty({0}, a.x.scalar_type(), a.x)};
}

// The gradients, of a call of either backward; dpre may be dhidden itself where there is no gate.
template <class Arguments>
std::tuple<Tensor, MaybeTensor, MaybeTensor> gradients(const Arguments& a, const Tensor& dhidden, const Tensor& dpre) {
    const int64_t rows = dhidden.size(0), columns = dhidden.size(1);
    const RowBlocks blocks(rows);
    MaybeTensor hidden, sums, dbias_sum;
    if (a.recompute)
        hidden = empty({rows, columns}, a.saved.scalar_type(), a.saved);
    if (a.dbias) {
        sums = empty({blocks.count, 1, columns}, ScalarType::Float, a.saved);
        dbias_sum = empty({columns}, *a.dbias, a.saved);
    }
    const Rows saved_rows(a.saved);
    const HiddenBackward call{
        .dhidden = matrix(Rows(dhidden)),
        .saved = matrix(saved_rows),
        .dpre = matrix(Rows(dpre)),
        .hidden = hidden ? matrix(Rows(*hidden)) : Matrix{},
        .sums = data_of<float>(sums),
        .rows = rows,
        .columns = columns,
        .block_rows = blocks.rows,
        .activation = activation_of(a.activation),
        .gated = a.gated,
        .dropout = dropout_of(a.seed, a.dropout_p, a.site),
    };
    for_rows(blocks.count, blocks.rows * columns,
             [&](int64_t begin, int64_t end) { TFM_RUN(hidden_backward, call, begin, end); });
    if (sums)
        sum_blocks(*sums, {dbias_sum});
    return {dpre, hidden, dbias_sum};
}

std::tuple<Tensor, MaybeTensor, MaybeTensor>
activation_dropout_backward(const arguments::ActivationDropoutBackward& a) {
    return gradients(a, a.dhidden, empty({a.saved.size(0), a.saved.size(1)}, a.saved.scalar_type(), a.saved));
}

std::tuple<Tensor, MaybeTensor, MaybeTensor> linear_activation_backward(const arguments::LinearActivationBackward& a) {
    const Tensor dhidden = torch::stable::matmul(a.dy, a.weight);
    if (!a.gated)
        return gradients(a, dhidden, dhidden);
    return gradients(a, dhidden, empty({dhidden.size(0), 2 * dhidden.size(1)}, a.dy.scalar_type(), a.dy));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::ActivationDropout, activation_dropout>(m);
    implement<arguments::ActivationDropoutBackward, activation_dropout_backward>(m);
    implement<arguments::LinearActivation, linear_activation>(m);
    implement<arguments::LinearActivationBackward, linear_activation_backward>(m);
}

} // namespace tfm

#endif
