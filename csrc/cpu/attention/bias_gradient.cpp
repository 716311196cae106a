// The gradient of an additive bias, summed over the dimensions along which it broadcasts.
//
//     dbias = Σ ds     over the sequences, heads and queries that share an element; ds of gradient_tile.h
//
// A task is one tile of the bias. It goes over those that share the tile, always in the same order, and forms their ds
// again: two products more, so that nothing of the size [B, H, Sq, Sk] is ever stored and no two threads add to one
// number.
#include "cpu/isa.h"

#include "cpu/attention/gradient_tile.h"

namespace tfm {

struct BiasGradient {
    Attention attention;
    Cotangents given;
    Heads dbias;
    int64_t sequences, queries, keys;
    bool shares_sequences, shares_heads, shares_queries;
};

namespace {

struct BiasScratch : TileScratch {
    int64_t sums = carve(*this, BLOCK_QUERIES, BLOCK_KEYS);
};

} // namespace

TFM_KERNEL(attention_bias_gradient, const BiasGradient& call, const Task* tasks, int64_t begin, int64_t end,
           float* scratch)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

void attention_bias_gradient(const BiasGradient& wanted, const Task* tasks, int64_t begin, int64_t end,
                             float* scratch) {
    const Attention& call = wanted.attention;
    const BiasScratch at{call};
    float* const sums = scratch + at.sums;
    GradientTile part(call, wanted.given, at, scratch);
    for (const Task* task = tasks + begin; task < tasks + end; ++task) {
        const int64_t keys = smaller(BLOCK_KEYS, wanted.keys - task->first_key), stride = padded(keys);
        const int64_t rows = wanted.shares_queries ? 1 : smaller(BLOCK_QUERIES, wanted.queries - task->first_query);
        for (int64_t i = 0; i < rows * stride; i += WIDTH)
            store(sums + i, Floats{});
        const int64_t last_sequence = wanted.shares_sequences ? wanted.sequences : task->sequence + 1;
        const int64_t last_head = wanted.shares_heads ? call.heads : task->head + 1;
        const int64_t last_query = wanted.shares_queries ? wanted.queries : task->first_query + 1;
        for (int64_t sequence = task->sequence; sequence < last_sequence; ++sequence)
            for (int64_t head = task->head; head < last_head; ++head)
                for (int64_t query = task->first_query; query < last_query; query += BLOCK_QUERIES) {
                    const Extent& extent = call.extents[sequence];
                    // Of packed sequences some are shorter than the bias has rows.
                    Tile tile{sequence,        head, query, smaller(BLOCK_QUERIES, extent.query_length - query),
                              task->first_key, 0,    0};
                    if (tile.rows <= 0)
                        break;
                    const Span seen = visible_keys(call, extent, tile.row, tile.rows);
                    tile.keys = smaller(keys, seen.end - tile.key);
                    if (tile.keys <= 0 || seen.begin >= tile.key + tile.keys)
                        continue;
                    part.load_keys(tile);
                    const bool whole = part.is_whole(tile);
                    part.load_queries(tile, !whole);
                    part.compute(tile, whole, true, false);
                    for (int64_t key = 0; key < tile.keys; key += WIDTH) {
                        Floats total{};
                        for (int64_t row = 0; row < tile.rows; ++row) {
                            const Floats gradient = load(part.gradients + row * part.stride + key);
                            if (wanted.shares_queries)
                                total += gradient;
                            else
                                store(sums + row * stride + key, load(sums + row * stride + key) + gradient);
                        }
                        if (wanted.shares_queries)
                            store(sums + key, load(sums + key) + total);
                    }
                }
        Heads place = wanted.dbias;
        const int64_t width = place.narrow ? sizeof(BFloat16) : sizeof(float);
        place.data = static_cast<char*>(place.data) + task->first_key * width;
        scatter(sums, 1.0f, place, task->sequence, task->head, task->first_query, rows, keys);
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/attention/gradients.h"

namespace tfm {

void bias_gradient(const AttentionInputs& inputs, const Cotangents& given, const Tensor& dbias) {
    const Attention& call = inputs.call;
    const BiasGradient wanted{
        .attention = call,
        .given = given,
        .dbias = heads_of(dbias),
        .sequences = inputs.sequences(),
        .queries = dbias.size(2) == 1 ? call.longest_query : dbias.size(2),
        .keys = dbias.size(3),
        .shares_sequences = dbias.size(0) == 1,
        .shares_heads = dbias.size(1) == 1,
        .shares_queries = dbias.size(2) == 1,
    };
    const int64_t members = (wanted.shares_sequences ? wanted.sequences : 1) * (wanted.shares_heads ? call.heads : 1);
    const int64_t queries = wanted.shares_queries ? 1 : wanted.queries;
    Tasks tasks;
    for (int64_t sequence = 0; sequence < dbias.size(0); ++sequence)
        for (int64_t head = 0; head < dbias.size(1); ++head)
            for (int64_t query = 0; query < queries; query += BLOCK_QUERIES)
                for (int64_t key = 0; key < wanted.keys; key += BLOCK_KEYS) {
                    const int64_t rows = wanted.shares_queries ? wanted.queries : BLOCK_QUERIES;
                    tasks.add({sequence, head, query, key}, members * rows * BLOCK_KEYS);
                }
    tasks.run(call.dim + call.value_dim, BiasScratch{call}.floats,
              [&](const Task* all, int64_t begin, int64_t end, float* scratch) {
                  TFM_RUN(attention_bias_gradient, wanted, all, begin, end, scratch);
              });
}

} // namespace tfm

#endif
