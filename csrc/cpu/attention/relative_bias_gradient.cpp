// The gradient of a bias by distance, summed over all scores whose keys lie as far from their queries.
//
//     drelative_bias = Σ ds     over the sequences, and the queries and keys so far apart; ds of gradient_tile.h
//
// A task is a (sequence, head): it forms ds again, tile by tile, and adds up sums of its own, which then are added in
// the order of the sequences. So the bits are the same on any number of threads.
#include "cpu/isa.h"

#include "cpu/attention/gradient_tile.h"

namespace tfm {

struct RelativeBiasGradient {
    Attention attention;
    Cotangents given;
    float* partials; // [sequences, heads, width]
};

TFM_KERNEL(attention_relative_bias_gradient, const RelativeBiasGradient& call, const Task* tasks, int64_t begin,
           int64_t end, float* scratch)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

namespace {

// Adds the gradients of one row of keys, the first `distance` from the query's position, to sums from -farthest on.
void add_row(const float* gradients, int64_t keys, int64_t distance, int64_t farthest, float* sums) {
    const int64_t first = smaller(larger(-farthest - distance, 0), keys);
    const int64_t last = larger(smaller(farthest + 1 - distance, keys), first);
    float nearer = 0.0f, farther = 0.0f;
    for (int64_t key = 0; key < first; ++key)
        nearer += gradients[key];
    float* const at = sums + farthest + distance;
    for (int64_t key = first; key < last; ++key)
        at[key] += gradients[key];
    for (int64_t key = last; key < keys; ++key)
        farther += gradients[key];
    sums[0] += nearer;
    sums[2 * farthest] += farther;
}

} // namespace

void attention_relative_bias_gradient(const RelativeBiasGradient& wanted, const Task* tasks, int64_t begin, int64_t end,
                                      float* scratch) {
    const Attention& call = wanted.attention;
    const int64_t width = call.relative_bias.width();
    GradientTile part(call, wanted.given, TileScratch{call}, scratch);
    for (const Task* task = tasks + begin; task < tasks + end; ++task) {
        const Extent& extent = call.extents[task->sequence];
        float* const sums = wanted.partials + (task->sequence * call.heads + task->head) * width;
        for (int64_t i = 0; i < width; ++i)
            sums[i] = 0.0f;
        Tile tile{task->sequence, task->head, 0, 0, 0, 0, 0};
        for (tile.key = 0; tile.key < extent.key_length; tile.key += BLOCK_KEYS) {
            tile.keys = smaller(BLOCK_KEYS, extent.key_length - tile.key);
            const Span rows = visible_queries(call, extent, tile.key, tile.keys);
            if (rows.begin == rows.end)
                continue;
            part.load_keys(tile);
            for (tile.row = rows.begin; tile.row < rows.end; tile.row += BLOCK_QUERIES) {
                tile.rows = smaller(BLOCK_QUERIES, rows.end - tile.row);
                const bool whole = part.is_whole(tile);
                part.load_queries(tile, !whole);
                part.compute(tile, whole, true, false);
                for (int64_t row = 0; row < tile.rows; ++row)
                    add_row(part.gradients + row * part.stride, tile.keys, tile.key - (tile.row + row + extent.start),
                            call.relative_bias.farthest, sums);
            }
        }
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/attention/gradients.h"

namespace tfm {

void relative_bias_gradient(const AttentionInputs& inputs, const Cotangents& given, const Tensor& gradient) {
    const Attention& call = inputs.call;
    const Tensor partials =
        empty({inputs.sequences(), 1, call.heads * call.relative_bias.width()}, ScalarType::Float, gradient);
    const RelativeBiasGradient wanted{call, given, static_cast<float*>(partials.data_ptr())};
    Tasks tasks;
    for (int64_t sequence = 0; sequence < inputs.sequences(); ++sequence) {
        const Extent& extent = inputs.extents[sequence];
        const int64_t work = extent.query_length * seen_keys(call, extent, 0, extent.query_length);
        for (int64_t head = 0; head < call.heads; ++head)
            tasks.add({sequence, head, 0, 0}, work);
    }
    tasks.run(call.dim + call.value_dim, TileScratch{call}.floats,
              [&](const Task* all, int64_t begin, int64_t end, float* scratch) {
                  TFM_RUN(attention_relative_bias_gradient, wanted, all, begin, end, scratch);
              });
    sum_blocks<double>(partials, {MaybeTensor(gradient)});
}

} // namespace tfm

#endif
