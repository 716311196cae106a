// The mixture's backward, over rows as they are sorted; here the weights are the right side of the products, as they
// lie:
//
//     d [rows, I] = dy [rows, H] second [H, I]        dx [rows, H] = dpre [rows, W] first [W, H]
//     dfirst [W, H] = dpreᵀ x        dsecond [H, I] = dyᵀ hidden
//
// with hidden times the routing weight. A task is a block of an expert's columns, or of a gradient's rows.
#include "cpu/experts/call.h"

namespace tfm {

struct MixtureBackward {
    const float *const *first, *const *second; // of each expert
    const float* pre;                          // [rows, W]
    const float* second_bias;
    const float *dy_rows, *x_rows; // of each row's token, padded
    float *dpre, *hidden;          // padded rows
    float* shares;                 // [blocks of I, rows]: of d · hidden
    float* dx_rows;                // padded rows
    float* dweights;               // [tokens, places]
};

// What gathers padded rows, one for each sorted one.
struct Gather {
    TokenRows from;
    int64_t columns;
    float* to;
};

// A gradient [experts, rows, columns] of an expert's leftᵀ right, of padded rows.
struct OuterProduct {
    const float *left, *right;
    int64_t rows, columns;
    float* out;
};

// A gradient [experts, columns] of an expert's rows, weighted or not.
struct RowSum {
    const float* rows;
    int64_t columns;
    bool weighted;
    float* out;
};

TFM_KERNEL(gather_rows, const Routed& routed, const Gather& call, int64_t begin, int64_t end)
TFM_KERNEL(hidden_gradient, const Routed& routed, const MixtureBackward& call, float* scratch, int64_t begin,
           int64_t end)
TFM_KERNEL(input_gradient, const Routed& routed, const MixtureBackward& call, float* scratch, int64_t begin,
           int64_t end)
TFM_KERNEL(routing_gradient, const Routed& routed, const MixtureBackward& call, int64_t begin, int64_t end)
TFM_KERNEL(outer_products, const Routed& routed, const OuterProduct& call, float* scratch, int64_t begin, int64_t end)
TFM_KERNEL(sum_rows, const Routed& routed, const RowSum& call, int64_t begin, int64_t end)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/activations.h"
#include "cpu/matmul.h"

namespace tfm::TFM_ISA {

// A block of columns of a weight [rows, columns] as the right side of a product: where it lies, or copied to scratch,
// if its last vector is not whole.
TFM_INLINE Columns weight_columns(const float* weight, int64_t rows, int64_t columns, int64_t first, float* scratch) {
    if (columns % WIDTH == 0)
        return {weight + first, columns, PAIR};
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = first; column < smaller(first + BLOCK, columns); column += WIDTH)
            store(scratch + row * BLOCK + column - first, load(weight + row * columns + column, columns - column));
    return {scratch, BLOCK, PAIR};
}

void gather_rows(const Routed& routed, const Gather& call, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        copy_row(call.from, routed.order[row] / routed.places, call.columns, call.to + row * padded(call.columns));
}

// Of a few rows and columns of d, from `tile`.
template <Activation ACTIVATION>
static void finish_hidden(const Routed& routed, const MixtureBackward& call, const float* tile, int64_t first_row,
                          int64_t rows, int64_t first_column, int64_t columns) {
    const int64_t all = routed.offsets[routed.experts], width = padded(routed.width), half = padded(routed.columns);
    for (int64_t row = first_row; row < first_row + rows; ++row, tile += BLOCK) {
        const Floats factor = broadcast(routed.weights[routed.order[row]]);
        const float* const pre = call.pre + row * routed.width;
        float *const dpre = call.dpre + row * width, *const hidden = call.hidden + row * half;
        Floats share{};
        for (int64_t column = 0; column < columns; column += WIDTH) {
            const int64_t place = first_column + column, count = routed.columns - place;
            const Floats gradient = inside(load(tile + column), count);
            const Activated activated = activate<ACTIVATION>(load(pre + place, count));
            Floats value = activated.value, d_pre = gradient * factor * activated.derivative;
            if (routed.gated) {
                const Floats up = load(pre + routed.columns + place, count);
                store(dpre + routed.columns + place, gradient * factor * value, count);
                d_pre *= up;
                value *= up;
            }
            store(dpre + place, d_pre, count);
            value = inside(value, count);
            store(hidden + place, value * factor);
            share += gradient * value;
        }
        if (call.shares)
            call.shares[first_column / BLOCK * all + row] = sum(share);
    }
}

void hidden_gradient(const Routed& routed, const MixtureBackward& call, float* scratch, int64_t begin, int64_t end) {
    const int64_t stride = padded(routed.depth);
    float *const tile = scratch, *const copied = scratch + BLOCK * BLOCK;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t expert = task % routed.experts, column = task / routed.experts * BLOCK;
        const int64_t columns = smaller(BLOCK, routed.columns - column), last = routed.offsets[expert + 1];
        if (routed.offsets[expert] == last)
            continue;
        const Columns weights = weight_columns(call.second[expert], routed.depth, routed.columns, column, copied);
        for (int64_t row = routed.offsets[expert]; row < last; row += BLOCK) {
            const int64_t rows = smaller(BLOCK, last - row);
            product<false, false>(rows, columns, routed.depth, call.dy_rows + row * stride, stride, weights, tile,
                                  BLOCK);
            with_activation(routed.activation, [&](auto chosen) {
                finish_hidden<decltype(chosen)::VALUE>(routed, call, tile, row, rows, column, columns);
            });
        }
    }
}

void input_gradient(const Routed& routed, const MixtureBackward& call, float* scratch, int64_t begin, int64_t end) {
    const int64_t stride = padded(routed.width), out = padded(routed.depth);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t expert = task % routed.experts, column = task / routed.experts * BLOCK;
        const int64_t columns = smaller(BLOCK, routed.depth - column), last = routed.offsets[expert + 1];
        if (routed.offsets[expert] == last)
            continue;
        const Columns weights = weight_columns(call.first[expert], routed.width, routed.depth, column, scratch);
        for (int64_t row = routed.offsets[expert]; row < last; row += BLOCK)
            product<false, false>(smaller(BLOCK, last - row), columns, routed.width, call.dpre + row * stride, stride,
                                  weights, call.dx_rows + row * out + column, out);
    }
}

void routing_gradient(const Routed& routed, const MixtureBackward& call, int64_t begin, int64_t end) {
    const int64_t all = routed.offsets[routed.experts];
    for (int64_t source = begin; source < end; ++source) {
        const int64_t row = routed.place[source];
        float total = 0.0f;
        if (row < all) {
            for (int64_t block = 0; block * BLOCK < routed.columns; ++block)
                total += call.shares[block * all + row];
            if (call.second_bias) {
                int64_t expert = 0;
                while (routed.offsets[expert + 1] <= row)
                    ++expert;
                const float* const bias = call.second_bias + expert * routed.depth;
                Floats products{};
                for (int64_t column = 0; column < routed.depth; column += WIDTH)
                    products += load(call.dy_rows + row * padded(routed.depth) + column) *
                                load(bias + column, routed.depth - column);
                total += sum(products);
            }
        }
        call.dweights[source] = total;
    }
}

void outer_products(const Routed& routed, const OuterProduct& call, float* scratch, int64_t begin, int64_t end) {
    const int64_t left = padded(call.rows), right = padded(call.columns);
    const bool in_place = call.columns % WIDTH == 0;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t expert = task % routed.experts, row = task / routed.experts * BLOCK;
        const int64_t rows = smaller(BLOCK, call.rows - row), first = routed.offsets[expert];
        const int64_t place = (expert * call.rows + row) * call.columns;
        float* const to = in_place ? call.out + place : scratch;
        const int64_t stride = in_place ? call.columns : right;
        product<true, false>(rows, call.columns, routed.offsets[expert + 1] - first, call.left + first * left + row,
                             left, {call.right + first * right, right, PAIR}, to, stride);
        for (int64_t i = 0; !in_place && i < rows; ++i)
            for (int64_t column = 0; column < call.columns; column += WIDTH)
                store(call.out + place + i * call.columns + column, load(scratch + i * right + column),
                      call.columns - column);
    }
}

void sum_rows(const Routed& routed, const RowSum& call, int64_t begin, int64_t end) {
    const int64_t stride = padded(call.columns);
    for (int64_t expert = begin; expert < end; ++expert)
        for (int64_t column = 0; column < call.columns; column += WIDTH) {
            Floats total{}, some{};
            for (int64_t row = routed.offsets[expert]; row < routed.offsets[expert + 1]; ++row) {
                const Floats value = load(call.rows + row * stride + column);
                some += call.weighted ? value * routed.weights[routed.order[row]] : value;
                // Added up among themselves first, so that a sum of many loses few digits.
                if (row % LONGEST_SUM == 0) {
                    total += some;
                    some = Floats{};
                }
            }
            store(call.out + expert * call.columns + column, total + some, call.columns - column);
        }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/experts/host.h"

namespace tfm {

namespace {

float* numbers(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

void gather(const Routed& routed, const Tensor& from, const Memory& to) {
    const Gather call{rows_of(from), routed.depth, to.get()};
    for_rows(routed.offsets[routed.experts], routed.depth,
             [&](int64_t begin, int64_t end) { TFM_RUN(gather_rows, routed, call, begin, end); });
}

// Of leftᵀ right, [experts, rows, columns].
MaybeTensor outer(const RoutedCall& routing, const Memory& left, const Memory& right, int64_t rows, int64_t columns,
                  const Tensor& like) {
    const Routed& routed = routing.routed;
    Tensor out = empty({routed.experts, rows, columns}, ScalarType::Float, like);
    const OuterProduct call{left.get(), right.get(), rows, columns, numbers(out)};
    routing.for_blocks(rows, columns, [&](int64_t begin, int64_t end) {
        const Memory scratch = memory(BLOCK * padded(columns));
        TFM_RUN(outer_products, routed, call, scratch.get(), begin, end);
    });
    return out;
}

MaybeTensor bias_gradient(const Routed& routed, const Memory& rows, int64_t columns, bool weighted,
                          const Tensor& bias) {
    Tensor out = empty({routed.experts, columns}, ScalarType::Float, bias);
    const RowSum call{rows.get(), columns, weighted, numbers(out)};
    for_rows(routed.experts, columns * routed.tokens,
             [&](int64_t begin, int64_t end) { TFM_RUN(sum_rows, routed, call, begin, end); });
    return out;
}

using Gradients = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

Gradients experts_backward(const arguments::ExpertsBackward& a) {
    const RoutedCall routing(a, a.dy);
    const Routed& routed = routing.routed;
    const int64_t rows = routed.offsets[routed.experts], depth = padded(routed.depth);
    const bool needs_x = a.wanted[0], needs_weights = a.wanted[1], needs_first = a.wanted[2];
    const Memory dy = memory(rows * depth), x = memory(needs_first ? rows * depth : 0);
    const Memory dpre = memory(rows * padded(routed.width)), hidden = memory(rows * padded(routed.columns));
    const Memory shares = memory((routed.columns + BLOCK - 1) / BLOCK * rows);
    const Memory dx_rows = memory(needs_x ? rows * depth : 0);
    const Floats32 second_bias(a.second_bias);
    MaybeTensor dx, dweights, dfirst, dsecond, dfirst_bias, dsecond_bias;
    if (needs_weights)
        dweights = empty(shape_of(a.weights), ScalarType::Float, a.weights);
    const MixtureBackward call{
        .first = routing.first.data(),
        .second = routing.second.data(),
        .pre = static_cast<const float*>(a.pre.const_data_ptr()),
        .second_bias = second_bias.data(),
        .dy_rows = dy.get(),
        .x_rows = x.get(),
        .dpre = dpre.get(),
        .hidden = hidden.get(),
        .shares = shares.get(),
        .dx_rows = dx_rows.get(),
        .dweights = data_of<float>(dweights),
    };
    gather(routed, a.dy, dy);
    routing.for_blocks(routed.columns, routed.depth, [&](int64_t begin, int64_t end) {
        const Memory scratch = memory(BLOCK * (BLOCK + routed.depth));
        TFM_RUN(hidden_gradient, routed, call, scratch.get(), begin, end);
    });
    if (needs_x) {
        routing.for_blocks(routed.depth, routed.width, [&](int64_t begin, int64_t end) {
            const Memory scratch = memory(BLOCK * routed.width);
            TFM_RUN(input_gradient, routed, call, scratch.get(), begin, end);
        });
        dx = empty(shape_of(a.x), ScalarType::Float, a.x);
        const TokenSums sums{dx_rows.get(), false, numbers(*dx)};
        for_rows(routed.tokens, routed.places * routed.depth,
                 [&](int64_t begin, int64_t end) { TFM_RUN(sum_tokens, routed, sums, begin, end); });
    }
    if (needs_weights)
        for_rows(routed.tokens * routed.places, routed.depth,
                 [&](int64_t begin, int64_t end) { TFM_RUN(routing_gradient, routed, call, begin, end); });
    if (needs_first) {
        gather(routed, a.x, x);
        dfirst = outer(routing, dpre, x, routed.width, routed.depth, a.first[0]);
    }
    if (a.wanted[3])
        dsecond = outer(routing, dy, hidden, routed.depth, routed.columns, a.second[0]);
    if (a.wanted[4] && a.first_bias)
        dfirst_bias = bias_gradient(routed, dpre, routed.width, false, *a.first_bias);
    if (a.wanted[5] && a.second_bias)
        dsecond_bias = bias_gradient(routed, dy, routed.depth, true, *a.second_bias);
    return {dx, dweights, dfirst, dsecond, dfirst_bias, dsecond_bias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) { implement<arguments::ExpertsBackward, experts_backward>(m); }

} // namespace tfm

#endif
