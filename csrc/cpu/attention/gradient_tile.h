// One tile of the backward: weights again, from the statistics that the forward left, and the gradient of the scores.
//
//     p = exp2((s - top) · log2(e) - log2 Σ)      dp = dropout(dout vᵀ)      delta = Σ dout · out - dlse
//     ds = p · (dp - delta)      by the scores; by q·k it is ds · slope, with the slope of a softcap
//
// The scores are the forward's to the last bit: products of the same numbers, added in the same order.
// (Dao et al., "FlashAttention", 2022, appendix B.4.) A query without keys, and its dout, are read as 0.
#pragma once

#include "cpu/attention/call.h"

namespace tfm {

struct TileScratch : Carver<Attention> {
    const int64_t most_queries = tile_queries(call), most_keys = tile_keys(call);
    // Of the tile's queries.
    int64_t query = carve(*this, most_queries, call.dim);
    int64_t dout = carve(*this, most_queries, call.value_dim);
    int64_t output = carve(*this, most_queries, call.value_dim);
    int64_t tops = carve(*this, 1, most_queries);
    int64_t logs = carve(*this, 1, most_queries);
    int64_t deltas = carve(*this, 1, most_queries);
    // Of its keys: as they are, and transposed.
    int64_t key_rows = carve(*this, most_keys, call.dim);
    int64_t keys = carve(*this, padded(call.dim), most_keys + LANES);
    int64_t value_rows = carve(*this, most_keys, call.value_dim);
    int64_t values = carve(*this, padded(call.value_dim), most_keys + LANES);
    // Of its scores.
    int64_t weights = carve(*this, most_queries, most_keys);
    int64_t gradients = carve(*this, most_queries, most_keys);
    int64_t slopes = carve(*this, call.outer != 0.0f ? most_queries : 0, most_keys);
    int64_t outcomes = carve_outcomes(*this);
};

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/attention/bias_sums.h"
#include "cpu/attention/tiles.h"

namespace tfm::TFM_ISA {

class GradientTile {
public:
    const Attention& call;
    const Cotangents& given;
    float *query, *dout, *tops, *logs, *deltas, *key_rows;
    float* weights;   // [rows, stride]: p as dropout leaves it, but for its scale
    float* gradients; // [rows, stride]: ds · slope
    int64_t stride;

    GradientTile(const Attention& call, const Cotangents& given, const TileScratch& at, float* scratch)
        : call(call), given(given), query(scratch + at.query), dout(scratch + at.dout), tops(scratch + at.tops),
          logs(scratch + at.logs), deltas(scratch + at.deltas), key_rows(scratch + at.key_rows),
          weights(scratch + at.weights), gradients(scratch + at.gradients), stride(0), output(scratch + at.output),
          keys(scratch + at.keys), value_rows(scratch + at.value_rows), values(scratch + at.values),
          slopes(call.outer != 0.0f ? scratch + at.slopes : nullptr),
          outcomes(call.dropout.seed ? reinterpret_cast<uint16_t*>(scratch + at.outcomes) : nullptr) {}

    void load_keys(const Tile& tile) {
        const Extent& extent = call.extents[tile.sequence];
        const Span seen = visible_keys(call, extent, 0, extent.query_length);
        gather_keys(call, call.key, tile, seen, call.dim, key_rows);
        if (!has_few_queries(call))
            transpose_to_panels(key_rows, padded(call.dim), tile.keys, call.dim, call.inner, keys);
        gather_keys(call, call.value, tile, seen, call.value_dim, value_rows);
        transpose_to_panels(value_rows, padded(call.value_dim), tile.keys, call.value_dim, 1.0f, values);
    }

    // Whether these are all keys that the tile's queries see.
    bool is_whole(const Tile& tile) const {
        const Span seen = visible_keys(call, call.extents[tile.sequence], tile.row, tile.rows);
        return seen.begin >= tile.key && seen.end <= tile.key + tile.keys;
    }

    // Also tops, logs and deltas; the log of a query without keys is infinite: its weights are 0. Without the output
    // deltas lack Σ dout · out, which `compute` finds again where the tile is whole.
    void load_queries(const Tile& tile, bool with_output) {
        const int64_t first = call.extents[tile.sequence].query_first + tile.row, columns = call.value_dim;
        const RowNumbers &top_of = given.statistics.tops, &log_of = given.statistics.logs, &dlse = given.dlse;
        for (int64_t row = 0; row < tile.rows; ++row) {
            const float top = number_of(top_of, tile, first + row);
            const bool is_empty = top == -INFINITE;
            tops[row] = is_empty ? 0.0f : top;
            logs[row] = is_empty ? INFINITE : number_of(log_of, tile, first + row);
            deltas[row] = dlse.data && !is_empty ? -number_of(dlse, tile, first + row) : 0.0f;
        }
        const auto has_keys = [this](int64_t row) __attribute__((always_inline)) { return logs[row] != INFINITE; };
        gather(call.query, tile.sequence, tile.head, first, tile.rows, call.dim, query, has_keys);
        gather(given.dout, tile.sequence, tile.head, first, tile.rows, columns, dout, has_keys);
        if (!with_output)
            return;
        gather(given.output, tile.sequence, tile.head, first, tile.rows, columns, output, has_keys);
        for (int64_t start = 0; start < tile.rows; start += WIDTH) {
            Floats parts[WIDTH] = {};
            for (int64_t i = 0; i < smaller(tile.rows - start, WIDTH); ++i)
                for (int64_t column = 0; column < columns; column += WIDTH) {
                    const int64_t from = (start + i) * padded(columns) + column;
                    parts[i] += load(dout + from) * load(output + from);
                }
            store(deltas + start, load(deltas + start) + sums_of(parts));
        }
    }

    // weights, and where asked for gradients, of which ds is added to `sums`. A `whole` tile has Σ p · dp = Σ dout ·
    // out, of numbers that nobody has rounded.
    void compute(const Tile& tile, bool whole, bool with_gradients, const HeadSums& sums) {
        stride = padded(tile.keys);
        if (has_few_queries(call))
            few_scores(call, tile, query, key_rows, weights, stride);
        else
            product<false, false>(tile.rows, tile.keys, call.dim, query, padded(call.dim),
                                  {keys, PAIR, call.dim * PAIR}, weights, stride);
        if (with_gradients)
            product<false, false>(tile.rows, tile.keys, call.value_dim, dout, padded(call.value_dim),
                                  {values, PAIR, call.value_dim * PAIR}, gradients, stride);
        const int64_t drawn = outcomes ? draw_tile(call, tile, outcomes) : 0;
        for (int64_t start = 0; start < tile.rows; start += WIDTH) {
            const int64_t count = smaller(tile.rows - start, WIDTH);
            Floats parts[WIDTH] = {};
            for (int64_t i = 0; i < count; ++i)
                parts[i] = weigh(tile, start + i, drawn, with_gradients);
            if (whole)
                store(deltas + start, load(deltas + start) + sums_of(parts));
            for (int64_t i = 0; i < count; ++i)
                differentiate(tile, start + i, drawn, with_gradients, sums);
        }
    }

private:
    float *output, *keys, *value_rows, *values, *slopes;
    uint16_t* outcomes;

    // Of one row p, before dropout, and dp. Returns Σ p · dp.
    __attribute__((always_inline)) Floats weigh(const Tile& tile, int64_t row, int64_t drawn, bool with_gradients) {
        float *const weight_row = weights + row * stride, *const gradient_row = gradients + row * stride;
        finish_scores<false>(call, tile, row, weight_row, slopes ? slopes + row * stride : nullptr);
        const Floats top = broadcast(tops[row]), log = broadcast(logs[row]);
        Floats total{};
        for (int64_t key = 0; key < tile.keys; key += WIDTH) {
            const Floats weight = exp2((load(weight_row + key) - top) * LOG2E - log);
            store(weight_row + key, weight);
            if (!with_gradients)
                continue;
            Floats gradient = load(gradient_row + key);
            if (outcomes) {
                gradient = drop(call.dropout, outcomes + row * drawn + key, gradient);
                store(gradient_row + key, gradient);
            }
            total += weight * gradient;
        }
        return total;
    }

    // Of one row ds · slope, and p as dropout leaves it.
    __attribute__((always_inline)) void differentiate(const Tile& tile, int64_t row, int64_t drawn, bool with_gradients,
                                                      const HeadSums& sums) {
        float *const weight_row = weights + row * stride, *const gradient_row = gradients + row * stride;
        const Floats delta = broadcast(deltas[row]);
        for (int64_t key = 0; key < tile.keys; key += WIDTH) {
            const Floats weight = load(weight_row + key);
            if (with_gradients)
                store(gradient_row + key, weight * (load(gradient_row + key) - delta));
            if (outcomes)
                store(weight_row + key, kept(call.dropout, outcomes + row * drawn + key) ? weight : Floats{});
        }
        if (!with_gradients)
            return;
        if (sums.are_wanted()) {
            const int64_t query = tile.row + row, position = query + call.extents[tile.sequence].start;
            sums.add(gradient_row, query, tile.key, tile.keys, tile.key - position);
        }
        for (int64_t key = 0; slopes && key < tile.keys; key += WIDTH)
            store(gradient_row + key, load(gradient_row + key) * load(slopes + row * stride + key));
    }
};

} // namespace tfm::TFM_ISA

#endif
