// Masked softmax attention for CPUs, forward: kernels/attention/forward.py gives the mathematics.
//
// A task is a block of queries of one (sequence, head). It goes over tiles of the keys that these queries see: keys and
// values come into scratch memory as fp32, the keys transposed and times the scale; Q Kᵀ is formed, masked where an
// edge or a mask passes through, and turned into weights while it lies in the cache; weights · V is added to what the
// tiles before gave, once that has been scaled to the new maximum ("FlashAttention-2", 2023, section 3.1). Sequences of
// up to BLOCK_KEYS keys have one tile and rescale nothing.
//
// What a task computes depends on its place alone, never on the thread: the same bits on any number of them.
#include "cpu/isa.h"

#include "cpu/attention/forward.h"

namespace tfm {

namespace {

struct ForwardScratch : Carver<Attention> {
    const int64_t most_queries = tile_queries(call), most_keys = tile_keys(call);
    int64_t query = carve(*this, most_queries, call.dim);
    int64_t rows = carve(*this, most_keys, call.dim);
    int64_t keys = carve(*this, padded(call.dim), padded(most_keys) + LANES);
    int64_t values = carve(*this, most_keys, call.value_dim);
    int64_t scores = carve(*this, most_queries, most_keys);
    int64_t sums = carve(*this, most_queries, call.value_dim);
    int64_t tops = carve(*this, 1, most_queries);
    int64_t totals = carve(*this, 1, most_queries);
    int64_t logs = carve(*this, 1, most_queries);
    int64_t shrinks = carve(*this, 1, most_queries);
    int64_t outcomes = carve_outcomes(*this);
};

} // namespace

TFM_KERNEL(attention_forward, const AttentionForward& call, const Task* tasks, int64_t begin, int64_t end,
           float* scratch)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/attention/extra_score.h"

namespace tfm::TFM_ISA {

namespace {

struct Rows {
    float* tops;    // the largest score so far, LOWEST where no key has been seen
    float* totals;  // Σ exp(score - top)
    float* logs;    // log2 of that in the end
    float* shrinks; // what earlier sums are to be multiplied by
};

// Scores to weights, dropped out, in place; the rows' statistics follow.
void weigh(const Attention& call, const Tile& tile, float* scores, const uint16_t* outcomes, int64_t drawn,
           const Rows& rows) {
    for (int64_t first = 0; first < tile.rows; first += WIDTH) {
        const int64_t count = smaller(tile.rows - first, WIDTH);
        Floats parts[WIDTH];
        for (int64_t i = 0; i < WIDTH; ++i)
            parts[i] = i < count
                           ? finish_scores<true>(call, tile, first + i, scores + (first + i) * tile.stride, nullptr)
                           : Floats{};
        const Floats before = load(rows.tops + first), tops = maximum(maxima_of(parts), before);
        const Floats shrink = exp2((before - tops) * LOG2E);
        store(rows.tops + first, tops);
        store(rows.shrinks + first, shrink);
        for (int64_t i = 0; i < count; ++i) {
            float* const row = scores + (first + i) * tile.stride;
            const Floats top = broadcast(rows.tops[first + i]);
            Floats total{};
            for (int64_t key = 0; key < tile.keys; key += WIDTH) {
                Floats weight = exp2((load(row + key) - top) * LOG2E);
                total += weight;
                if (outcomes)
                    weight = kept(call.dropout, outcomes + (first + i) * drawn + key) ? weight : Floats{};
                store(row + key, weight);
            }
            parts[i] = total;
        }
        store(rows.totals + first, load(rows.totals + first) * shrink + sums_of(parts));
    }
}

// Adds the extra score, and leaves the statistics in tops and logs, and in totals what the sums are to be multiplied
// by: 0 without keys.
void finish_rows(const Attention& call, const Tile& tile, const Rows& rows) {
    const float kept_scale = call.dropout.seed ? call.dropout.scale : 1.0f;
    for (int64_t first = 0; first < tile.rows; first += WIDTH) {
        Floats top = load(rows.tops + first), total = load(rows.totals + first);
        const Ints is_empty = total == 0.0f;
        const Floats shrink = add_extra_score(call, tile.head, top, total);
        store(rows.tops + first, is_empty ? broadcast(-INFINITE) : top);
        store(rows.logs + first, is_empty ? Floats{} : log2(total));
        store(rows.totals + first, is_empty ? Floats{} : shrink * kept_scale / total);
    }
}

void fetch_task(const AttentionForward& forward, const Task& task) {
    const Attention& call = forward.attention;
    const Extent& extent = call.extents[task.sequence];
    const int64_t key_head = task.head / call.group, first = extent.query_first + task.first_query;
    const int64_t rows = extent.query_length - task.first_query;
    fetch(call.query, task.sequence, task.head, first, rows, call.dim);
    const int64_t first_key = extent.key_first + extent.key_begin, keys = extent.key_length - extent.key_begin;
    fetch(call.key, task.sequence, key_head, first_key, keys, call.dim);
    fetch(call.value, task.sequence, key_head, first_key, keys, call.value_dim);
}

} // namespace

void attention_forward(const AttentionForward& forward, const Task* tasks, int64_t begin, int64_t end, float* scratch) {
    const Attention& call = forward.attention;
    const ForwardScratch at{call};
    float *const query = scratch + at.query, *const sums = scratch + at.sums, *const scores = scratch + at.scores;
    uint16_t* const outcomes = call.dropout.seed ? reinterpret_cast<uint16_t*>(scratch + at.outcomes) : nullptr;
    const Rows rows{scratch + at.tops, scratch + at.totals, scratch + at.logs, scratch + at.shrinks};
    const int64_t query_stride = padded(call.dim), value_stride = padded(call.value_dim);
    for (const Task* task = tasks + begin; task < tasks + end; ++task) {
        const Extent& extent = call.extents[task->sequence];
        Tile tile{task->sequence, task->head, task->first_query, 0, 0, 0, 0};
        tile.rows = smaller(BLOCK_QUERIES, extent.query_length - tile.row);
        const int64_t first_query = extent.query_first + tile.row;
        gather(call.query, tile.sequence, tile.head, first_query, tile.rows, call.dim, query, Always{});
        if (task + 1 < tasks + end)
            fetch_task(forward, task[1]);
        fetch(forward.output, tile.sequence, tile.head, first_query, tile.rows, call.value_dim);
        for (int64_t row = 0; row < tile.rows; row += WIDTH) {
            store(rows.tops + row, broadcast(LOWEST));
            store(rows.totals + row, Floats{});
        }
        const Span keys = visible_keys(call, extent, tile.row, tile.rows);
        const int64_t first_key = keys.begin / WORD_KEYS * WORD_KEYS;
        for (tile.key = first_key; tile.key < keys.end; tile.key += BLOCK_KEYS) {
            tile.keys = smaller(BLOCK_KEYS, keys.end - tile.key);
            tile.stride = padded(tile.keys);
            gather_keys(call, call.key, tile, keys, call.dim, scratch + at.rows);
            transpose_to_panels(scratch + at.rows, query_stride, tile.keys, call.dim, call.inner, scratch + at.keys);
            gather_keys(call, call.value, tile, keys, call.value_dim, scratch + at.values);
            product<false, false>(tile.rows, tile.keys, call.dim, query, query_stride,
                                  {scratch + at.keys, PAIR, call.dim * PAIR}, scores, tile.stride);
            const int64_t drawn = outcomes ? draw_tile(call, tile, outcomes) : 0;
            weigh(call, tile, scores, outcomes, drawn, rows);
            const Columns values{scratch + at.values, value_stride, PAIR};
            if (tile.key == first_key) {
                product<false, false>(tile.rows, call.value_dim, tile.keys, scores, tile.stride, values, sums,
                                      value_stride);
                continue;
            }
            for (int64_t row = 0; row < tile.rows; ++row)
                for (int64_t column = 0; column < call.value_dim; column += WIDTH) {
                    float* const place = sums + row * value_stride + column;
                    store(place, load(place) * rows.shrinks[row]);
                }
            product<false, true>(tile.rows, call.value_dim, tile.keys, scores, tile.stride, values, sums, value_stride);
        }
        finish_rows(call, tile, rows);
        for (int64_t row = 0; row < tile.rows; ++row) {
            number_of(forward.statistics.tops, tile, first_query + row) = rows.tops[row];
            number_of(forward.statistics.logs, tile, first_query + row) = rows.logs[row];
            const float factor = rows.totals[row];
            // Without keys what the products left may be anything.
            float* const sum = sums + row * value_stride;
            for (int64_t column = 0; factor == 0.0f && column < call.value_dim; column += WIDTH)
                store(sum + column, Floats{});
            scatter(sum, factor, forward.output, tile.sequence, tile.head, first_query + row, 1, call.value_dim);
        }
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/attention/host.h"

namespace tfm {

namespace {

std::tuple<Tensor, Tensor> attention(const arguments::Attention& a) {
    const AttentionInputs inputs(a);
    const Attention& call = inputs.call;
    Tensor output = rows_like(a.query, a.value.size(a.value.dim() - 1));
    Tensor statistics = row_statistics(a.query);
    const AttentionForward forward{call, heads_of(output), statistics_of(statistics)};
    if (has_few_queries(call)) {
        attend_few_queries(forward, inputs.sequences());
        return {output, statistics};
    }
    Tasks tasks;
    for (int64_t sequence = 0; sequence < inputs.sequences(); ++sequence) {
        const Extent& extent = inputs.extents[sequence];
        for (int64_t head = 0; head < call.heads; ++head)
            for (int64_t first = 0; first < extent.query_length; first += BLOCK_QUERIES) {
                const int64_t rows = std::min(BLOCK_QUERIES, extent.query_length - first);
                tasks.add({sequence, head, first, 0}, rows * seen_keys(call, extent, first, rows));
            }
    }
    tasks.run(call.dim + call.value_dim, ForwardScratch{call}.floats,
              [&](const Task* all, int64_t begin, int64_t end, float* scratch) {
                  TFM_RUN(attention_forward, forward, all, begin, end, scratch);
              });
    return {output, statistics};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) { implement<arguments::Attention, attention>(m); }

} // namespace tfm

#endif
