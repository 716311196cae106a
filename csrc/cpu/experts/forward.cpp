// The mixture's forward. Weights are read where they lie, row by row, as the left side of the products; so tokens are
// what is transposed, a tile at a time:
//
//     preᵀ [W, tile] = first [W, H] xᵀ [H, tile]        outᵀ [H, tile] = second [H, I] hiddenᵀ [I, tile]
//
// The few tokens of a small tile stay rows (few.h).
//
// A task is a block of an expert's features, for all tiles of that expert: its rows of the weight come from memory
// once. pre and out leave as rows; hidden stays transposed, as the second product reads it.
#include "cpu/experts/call.h"

namespace tfm {

struct MixtureForward {
    TokenRows x;
    const RowTile* tiles;
    const int64_t* first_tile;                 // [experts + 1]
    const float *const *first, *const *second; // of each expert
    const float *first_bias, *second_bias;     // null: none
    float *x_tiles, *hidden_tiles;             // [tiles, padded H, TILE] and [tiles, padded I, TILE]
    float* out;                                // a padded row for each
    float* pre;                                // [rows, W]; null: not kept
};

// Tasks: tiles.
TFM_KERNEL(transpose_tokens, const Routed& routed, const MixtureForward& call, float* scratch, int64_t begin,
           int64_t end)
// Tasks: blocks of features, and for each all experts, so that threads have like shares whatever the experts have.
TFM_KERNEL(expert_hidden, const Routed& routed, const MixtureForward& call, float* scratch, int64_t begin, int64_t end)
TFM_KERNEL(expert_outputs, const Routed& routed, const MixtureForward& call, float* scratch, int64_t begin, int64_t end)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/activations.h"
#include "cpu/experts/few.h"
#include "cpu/matmul.h"

namespace tfm::TFM_ISA {

// A transposed tile [features, TILE] to rows `stride` apart.
static void store_transposed(const float* tile, int64_t features, int64_t count, float* to, int64_t stride) {
    for (int64_t token = 0; token < count; token += WIDTH)
        for (int64_t feature = 0; feature < features; feature += WIDTH) {
            Floats square[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                square[i] = load(tile + (feature + i) * TILE + token);
            transpose(square);
            for (int64_t i = 0; i < WIDTH && token + i < count; ++i)
                store(to + (token + i) * stride + feature, square[i], features - feature);
        }
}

// step(place, row) for every vector of a transposed tile's `count` tokens.
template <class Step>
TFM_INLINE void for_vectors(int64_t rows, int64_t count, const Step& step) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < count; column += WIDTH)
            step(row * TILE + column, row);
}

TFM_INLINE void add_bias(const float* bias, int64_t rows, int64_t count, float* tile) {
    for_vectors(rows, count, [&](int64_t place, int64_t row) { store(tile + place, load(tile + place) + bias[row]); });
}

void transpose_tokens(const Routed& routed, const MixtureForward& call, float* scratch, int64_t begin, int64_t end) {
    const int64_t stride = padded(routed.depth);
    for (int64_t number = begin; number < end; ++number) {
        const RowTile tile = call.tiles[number];
        const int64_t whole = (tile.count + WIDTH - 1) / WIDTH * WIDTH;
        float *const x = call.x_tiles + number * stride * TILE, *const rows = tile.count <= FEW ? x : scratch;
        for (int64_t i = 0; i < tile.count; ++i)
            copy_row(call.x, routed.order[tile.first + i] / routed.places, routed.depth, rows + i * stride);
        if (tile.count <= FEW)
            continue;
        for (int64_t place = tile.count * stride; place < whole * stride; ++place)
            scratch[place] = 0.0f;
        transpose_to_panels(scratch, stride, tile.count, routed.depth, 1.0f, x);
    }
}

void expert_hidden(const Routed& routed, const MixtureForward& call, float* scratch, int64_t begin, int64_t end) {
    const int64_t depth = routed.depth, halves = routed.gated ? 2 : 1;
    // Of gate and up.
    float* const up = scratch + (BLOCK + LANES) * TILE;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t expert = task % routed.experts, feature = task / routed.experts * BLOCK;
        const int64_t rows = smaller(BLOCK, routed.columns - feature);
        for (int64_t number = call.first_tile[expert]; number < call.first_tile[expert + 1]; ++number) {
            const RowTile tile = call.tiles[number];
            const float* const x = call.x_tiles + number * padded(depth) * TILE;
            for (int64_t half = 0; half < halves; ++half) {
                const int64_t column = half * routed.columns + feature;
                float* const pre = half ? up : scratch;
                const float* const weights = call.first[expert] + column * depth;
                if (tile.count <= FEW)
                    dot_products(tile.count, rows, depth, weights, x, padded(depth), pre, TILE);
                else
                    product<false, false>(rows, tile.count, depth, weights, depth, {x, PAIR, depth * PAIR}, pre, TILE);
                if (call.first_bias)
                    add_bias(call.first_bias + expert * routed.width + column, rows, tile.count, pre);
                if (call.pre)
                    store_transposed(pre, rows, tile.count, call.pre + tile.first * routed.width + column,
                                     routed.width);
            }
            float* const hidden_tile = call.hidden_tiles + number * padded(routed.columns) * TILE;
            float* const hidden = tile.count <= FEW ? scratch : hidden_tile + feature * TILE;
            with_activation(routed.activation, [&](auto chosen) {
                for_vectors(rows, tile.count, [&](int64_t place, int64_t) {
                    const Floats value = activate<decltype(chosen)::VALUE>(load(scratch + place)).value;
                    store(hidden + place, routed.gated ? value * load(up + place) : value);
                });
            });
            if (tile.count <= FEW)
                store_transposed(hidden, rows, tile.count, hidden_tile + feature, padded(routed.columns));
        }
    }
}

void expert_outputs(const Routed& routed, const MixtureForward& call, float* scratch, int64_t begin, int64_t end) {
    const int64_t columns = routed.columns, stride = padded(routed.depth);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t expert = task % routed.experts, feature = task / routed.experts * BLOCK;
        const int64_t rows = smaller(BLOCK, routed.depth - feature);
        for (int64_t number = call.first_tile[expert]; number < call.first_tile[expert + 1]; ++number) {
            const RowTile tile = call.tiles[number];
            const float* const hidden = call.hidden_tiles + number * padded(columns) * TILE;
            const float* const weights = call.second[expert] + feature * columns;
            if (tile.count <= FEW)
                dot_products(tile.count, rows, columns, weights, hidden, padded(columns), scratch, TILE);
            else
                product<false, false>(rows, tile.count, columns, weights, columns, {hidden, TILE, PAIR}, scratch, TILE);
            if (call.second_bias)
                add_bias(call.second_bias + expert * routed.depth + feature, rows, tile.count, scratch);
            store_transposed(scratch, rows, tile.count, call.out + tile.first * stride + feature, stride);
        }
    }
}

void sum_tokens(const Routed& routed, const TokenSums& call, int64_t first_token, int64_t last_token) {
    const int64_t stride = padded(routed.depth), with_expert = routed.offsets[routed.experts];
    for (int64_t token = first_token; token < last_token; ++token)
        for (int64_t column = 0; column < routed.depth; column += WIDTH) {
            Floats total{};
            for (int64_t k = 0; k < routed.places; ++k) {
                const int64_t source = token * routed.places + k, row = routed.place[source];
                if (row >= with_expert)
                    continue;
                const Floats value = load(call.rows + row * stride + column);
                total += call.weighted ? value * routed.weights[source] : value;
            }
            store(call.y + token * routed.depth + column, total, routed.depth - column);
        }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/experts/host.h"

namespace tfm {

namespace {

std::tuple<Tensor, Tensor, Tensor> experts_routing(const arguments::ExpertsRouting& a) {
    const Numbers index = numbers_of(a.index, {a.index.size(0), a.index.size(1)});
    const int64_t rows = static_cast<int64_t>(index.size());
    Tensor order = empty({rows}, ScalarType::Int, a.index), place = empty({rows}, ScalarType::Int, a.index);
    Tensor offsets = empty({a.experts + 1}, ScalarType::Int, a.index);
    const auto expert_of = [&](int64_t number) { return number >= 0 && number < a.experts ? number : a.experts; };
    // Where the next row of each expert goes; those without one go last.
    std::vector<int32_t> next(a.experts + 2, 0);
    for (const int64_t number : index)
        ++next[expert_of(number) + 1];
    for (int64_t expert = 0; expert <= a.experts; ++expert)
        next[expert + 1] += next[expert];
    std::copy_n(next.begin(), a.experts + 1, static_cast<int32_t*>(offsets.data_ptr()));
    for (int64_t source = 0; source < rows; ++source) {
        const int32_t row = next[expert_of(index[source])]++;
        static_cast<int32_t*>(order.data_ptr())[row] = static_cast<int32_t>(source);
        static_cast<int32_t*>(place.data_ptr())[source] = row;
    }
    return {order, place, offsets};
}

std::tuple<Tensor, Tensor> experts(const arguments::Experts& a) {
    const RoutedCall routing(a, a.x);
    const Routed& routed = routing.routed;
    Tensor y = empty(shape_of(a.x), ScalarType::Float, a.x);
    Tensor pre = empty({a.save ? a.order.size(0) : 0, routed.width}, ScalarType::Float, a.x);
    float* const kept = a.save ? static_cast<float*>(pre.data_ptr()) : nullptr;
    if (a.save) // Rows without an expert, which nobody computes.
        std::fill(kept + routed.offsets[routed.experts] * routed.width, kept + pre.numel(), 0.0f);
    const int64_t tiles = static_cast<int64_t>(routing.tiles.size());
    const Memory x_tiles = memory(tiles * padded(routed.depth) * TILE);
    const Memory hidden_tiles = memory(tiles * padded(routed.columns) * TILE);
    const Memory out = memory(a.order.size(0) * padded(routed.depth));
    const Floats32 first_bias(a.first_bias), second_bias(a.second_bias);
    const MixtureForward call{
        .x = rows_of(a.x),
        .tiles = routing.tiles.data(),
        .first_tile = routing.first_tile.data(),
        .first = routing.first.data(),
        .second = routing.second.data(),
        .first_bias = first_bias.data(),
        .second_bias = second_bias.data(),
        .x_tiles = x_tiles.get(),
        .hidden_tiles = hidden_tiles.get(),
        .out = out.get(),
        .pre = kept,
    };
    for_rows(tiles, routed.depth * TILE, [&](int64_t begin, int64_t end) {
        const Scratch scratch(TILE, routed.depth);
        TFM_RUN(transpose_tokens, routed, call, scratch.memory.get(), begin, end);
    });
    routing.for_blocks(routed.columns, routed.depth, [&](int64_t begin, int64_t end) {
        const Scratch scratch(2 * (BLOCK + LANES), TILE);
        TFM_RUN(expert_hidden, routed, call, scratch.memory.get(), begin, end);
    });
    routing.for_blocks(routed.depth, routed.columns, [&](int64_t begin, int64_t end) {
        const Scratch scratch(BLOCK + LANES, TILE);
        TFM_RUN(expert_outputs, routed, call, scratch.memory.get(), begin, end);
    });
    const TokenSums sums{out.get(), true, static_cast<float*>(y.data_ptr())};
    for_rows(routed.tokens, routed.places * routed.depth,
             [&](int64_t begin, int64_t end) { TFM_RUN(sum_tokens, routed, sums, begin, end); });
    return {y, pre};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::ExpertsRouting, experts_routing>(m);
    implement<arguments::Experts, experts>(m);
}

} // namespace tfm

#endif
