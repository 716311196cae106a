// The extra score: every row of a head has one more, of a key without a value, which the operator calls its `sinks`.
//
//     top = max(s, extra)      Σ = Σ exp(s - top) + exp(extra - top)
//     dextra = -Σ exp2((extra - top) · log2(e) - log2 Σ) · delta      over all queries; delta of gradient_tile.h
//
// Included where TFM_ISA is defined.
#pragma once

#include "cpu/attention/gradient_tile.h"

namespace tfm::TFM_ISA {

TFM_INLINE float extra_score(const Attention& call, int64_t head) { return get(call.extra_scores, head, 1)[0]; }

// Joins a head's extra score to the largest scores of rows and their Σ exp(s - top). Returns what earlier sums are to
// be multiplied by.
TFM_INLINE Floats add_extra_score(const Attention& call, int64_t head, Floats& top, Floats& total) {
    if (!call.extra_scores.data)
        return broadcast(1.0f);
    const Floats score = broadcast(extra_score(call, head)), higher = maximum(top, score);
    const Floats shrink = exp2((top - higher) * LOG2E);
    // Of two products the compiler would fuse one or the other, as the code around them has it.
    total = fused(total, shrink, exp2((score - higher) * LOG2E));
    top = higher;
    return shrink;
}

// Stores the gradient of a head's extra score over the queries of one sequence, where it is wanted.
inline void differentiate_extra_score(const Attention& call, GradientTile& part, Tile tile) {
    if (!call.extra_gradients)
        return;
    const Extent& extent = call.extents[tile.sequence];
    const float score = extra_score(call, tile.head);
    double total = 0.0;
    for (tile.row = 0; tile.row < extent.query_length; tile.row += BLOCK_QUERIES) {
        tile.rows = smaller(BLOCK_QUERIES, extent.query_length - tile.row);
        part.load_queries(tile, true);
        for (int64_t row = 0; row < tile.rows; row += WIDTH) {
            const Ints inside = lanes() < static_cast<int32_t>(tile.rows - row);
            const Floats share = exp2((score - load(part.tops + row)) * LOG2E - load(part.logs + row));
            total -= sum(inside ? share * load(part.deltas + row) : Floats{});
        }
    }
    call.extra_gradients[tile.sequence * call.heads + tile.head] = static_cast<float>(total);
}

} // namespace tfm::TFM_ISA
