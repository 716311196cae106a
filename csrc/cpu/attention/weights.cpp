// The softmax weights of an attention that has run, as dropout leaves them, from the statistics of its forward.
#include "cpu/isa.h"

#include "cpu/attention/call.h"

namespace tfm {

struct AttentionWeights {
    Attention attention;
    RowStatistics statistics;
    Heads weights;
    int64_t keys;
};

namespace {

struct WeightsScratch : Carver<Attention> {
    int64_t query = carve(*this, BLOCK_QUERIES, call.dim);
    int64_t rows = carve(*this, BLOCK_KEYS, call.dim);
    int64_t keys = carve(*this, padded(call.dim), BLOCK_KEYS);
    int64_t scores = carve(*this, BLOCK_QUERIES, BLOCK_KEYS);
    int64_t outcomes = carve_outcomes(*this);
};

} // namespace

TFM_KERNEL(attention_weights, const AttentionWeights& call, const Task* tasks, int64_t begin, int64_t end,
           float* scratch)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/attention/tiles.h"

namespace tfm::TFM_ISA {

void attention_weights(const AttentionWeights& wanted, const Task* tasks, int64_t begin, int64_t end, float* scratch) {
    const Attention& call = wanted.attention;
    const WeightsScratch at{call};
    float *const query = scratch + at.query, *const scores = scratch + at.scores;
    uint16_t* const outcomes = call.dropout.seed ? reinterpret_cast<uint16_t*>(scratch + at.outcomes) : nullptr;
    const int64_t dim = padded(call.dim);
    for (const Task* task = tasks + begin; task < tasks + end; ++task) {
        const Extent& extent = call.extents[task->sequence];
        Tile tile{task->sequence, task->head, task->first_query, 0, task->first_key, 0, 0};
        tile.rows = smaller(BLOCK_QUERIES, extent.query_length - tile.row);
        const int64_t keys = smaller(BLOCK_KEYS, wanted.keys - tile.key);
        tile.keys = larger(smaller(keys, extent.key_length - tile.key), 0);
        tile.stride = padded(keys);
        gather(call.query, tile.sequence, tile.head, tile.row, tile.rows, call.dim, query, Always{});
        gather_keys(call, call.key, tile, visible_keys(call, extent, 0, extent.query_length), call.dim,
                    scratch + at.rows);
        if (has_few_queries(call)) {
            few_scores(call, tile, query, scratch + at.rows, scores, tile.stride);
        } else {
            transpose_to_panels(scratch + at.rows, dim, tile.keys, call.dim, call.inner, scratch + at.keys);
            product<false, false>(tile.rows, tile.keys, call.dim, query, dim,
                                  {scratch + at.keys, PAIR, call.dim * PAIR}, scores, tile.stride);
        }
        const int64_t drawn = outcomes ? draw_tile(call, tile, outcomes) : 0;
        for (int64_t row = 0; row < tile.rows; ++row) {
            float* const numbers = scores + row * tile.stride;
            finish_scores<false>(call, tile, row, numbers, nullptr);
            const Floats top = broadcast(number_of(wanted.statistics.tops, tile, tile.row + row));
            const Floats log = broadcast(number_of(wanted.statistics.logs, tile, tile.row + row));
            for (int64_t key = 0; key < keys; key += WIDTH) {
                Floats weight{};
                if (key < tile.keys) {
                    weight = exp2((load(numbers + key) - top) * LOG2E - log);
                    // Without keys, where the query may be NaN.
                    weight = top == -INFINITE ? Floats{} : weight;
                    if (outcomes)
                        weight = drop(call.dropout, outcomes + row * drawn + key, weight);
                }
                store(numbers + key, weight);
            }
        }
        Heads place = wanted.weights;
        place.data = static_cast<char*>(place.data) + tile.key * (place.narrow ? sizeof(BFloat16) : sizeof(float));
        scatter(scores, 1.0f, place, tile.sequence, tile.head, tile.row, tile.rows, keys);
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/attention/host.h"

namespace tfm {

namespace {

Tensor attention_weights(const arguments::AttentionWeights& a) {
    const AttentionInputs inputs(a);
    const Attention& call = inputs.call;
    Tensor weights = empty({inputs.sequences(), call.heads, a.max_q, a.max_k}, a.query.scalar_type(), a.query);
    const AttentionWeights wanted{call, statistics_of(a.statistics), heads_of(weights), a.max_k};
    Tasks tasks;
    for (int64_t sequence = 0; sequence < inputs.sequences(); ++sequence)
        for (int64_t head = 0; head < call.heads; ++head)
            for (int64_t first = 0; first < a.max_q; first += BLOCK_QUERIES)
                for (int64_t key = 0; key < a.max_k; key += BLOCK_KEYS)
                    tasks.add({sequence, head, first, key},
                              std::min(BLOCK_QUERIES, a.max_q - first) * std::min(BLOCK_KEYS, a.max_k - key));
    tasks.run(call.dim + 8, WeightsScratch{call}.floats,
              [&](const Task* all, int64_t begin, int64_t end, float* scratch) {
                  TFM_RUN(attention_weights, wanted, all, begin, end, scratch);
              });
    return weights;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) { implement<arguments::AttentionWeights, attention_weights>(m); }

} // namespace tfm

#endif
