// Masked softmax attention for CPUs, backward: the gradients of query, key, value, the extra score and the biases.
//
//     dv = dropout(p)ᵀ dout      dq = scale · (ds · slope) k      dk = scale · (ds · slope)ᵀ q
//
// with p, ds and delta of gradient_tile.h. A task is a (sequence, key head): it goes over all query heads that share
// the key head, tile by tile, and adds up dk and dv of the whole sequence in scratch memory, dq of one query head at a
// time. So each sum belongs to one task, in one order: the same bits on any number of threads, from one pass of five
// products. Sequences of up to BLOCK_QUERIES queries and BLOCK_KEYS keys are one tile, and never leave the cache.
#include "cpu/isa.h"

#include "cpu/attention/bias_sums.h"
#include "cpu/attention/gradient_tile.h"

namespace tfm {

struct AttentionBackward {
    Attention attention;
    Cotangents given;
    Heads dq, dk, dv; // null where not wanted
    BiasSums sums;
};

namespace {

struct BackwardScratch : TileScratch {
    int64_t dq = carve(*this, call.longest_query, call.dim);
    int64_t dk = carve(*this, call.longest_key, call.dim);
    int64_t dv = carve(*this, call.longest_key, call.value_dim);
};

} // namespace

TFM_KERNEL(attention_backward, const AttentionBackward& call, const Task* tasks, int64_t begin, int64_t end,
           float* scratch)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/attention/extra_score.h"

namespace tfm::TFM_ISA {

namespace {

void clear(float* numbers, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows * padded(columns); i += WIDTH)
        store(numbers + i, Floats{});
}

// Zeros to rows [begin, end) of a head of `first` and further rows.
void erase(const Heads& x, int64_t sequence, int64_t head, int64_t first, int64_t begin, int64_t end, int64_t columns) {
    const int64_t base = sequence * x.sequence + head * x.head + first * x.row;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t place = base + row * x.row, width = x.narrow ? sizeof(BFloat16) : sizeof(float);
        __builtin_memset(static_cast<char*>(x.data) + place * width, 0, columns * width);
    }
}

// Gradients of a task's keys, of which scratch memory has those from the sequence's first key on.
void write_keys(const Heads& to, const Task& task, const Extent& extent, const float* from, float factor,
                int64_t columns) {
    const auto [begin, end] = Span{extent.key_begin, extent.key_length};
    scatter(from + begin * padded(columns), factor, to, task.sequence, task.head, extent.key_first + begin, end - begin,
            columns);
    // Keys outside have a gradient, too: 0.
    erase(to, task.sequence, task.head, extent.key_first, 0, begin, columns);
    erase(to, task.sequence, task.head, extent.key_first, end, extent.key_rows, columns);
}

// One of the two products; to add is to read what is there.
template <bool TRANSPOSED>
void multiply(bool adds, int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
              float* c) {
    const int64_t stride = padded(columns);
    if (adds)
        product<TRANSPOSED, true>(rows, columns, depth, a, a_stride, {b, stride, PAIR}, c, stride);
    else
        product<TRANSPOSED, false>(rows, columns, depth, a, a_stride, {b, stride, PAIR}, c, stride);
}

void fetch_task(const AttentionBackward& backward, const Task& task) {
    const Attention& call = backward.attention;
    const Extent& extent = call.extents[task.sequence];
    const int64_t first_key = extent.key_first + extent.key_begin, keys = extent.key_length - extent.key_begin;
    fetch(call.key, task.sequence, task.head, first_key, keys, call.dim);
    fetch(call.value, task.sequence, task.head, first_key, keys, call.value_dim);
    const int64_t head = task.head * call.group, first = extent.query_first, rows = extent.query_length;
    fetch(call.query, task.sequence, head, first, rows, call.dim);
    fetch(backward.given.dout, task.sequence, head, first, rows, call.value_dim);
}

} // namespace

void attention_backward(const AttentionBackward& backward, const Task* tasks, int64_t begin, int64_t end,
                        float* scratch) {
    const Attention& call = backward.attention;
    const BackwardScratch at{call};
    float *const dq = scratch + at.dq, *const dk = scratch + at.dk, *const dv = scratch + at.dv;
    const bool want_query = backward.dq.data, want_key = backward.dk.data, want_value = backward.dv.data;
    const int64_t dim = padded(call.dim), value_dim = padded(call.value_dim);
    GradientTile part(call, backward.given, at, scratch);
    for (const Task* task = tasks + begin; task < tasks + end; ++task) {
        const Extent& extent = call.extents[task->sequence];
        const int64_t key_begin = extent.key_begin, key_length = extent.key_length;
        if (task + 1 < tasks + end)
            fetch_task(backward, task[1]);
        const int64_t first_head = task->head * call.group;
        for (int64_t head = first_head; head < first_head + call.group; ++head) {
            Tile tile{task->sequence, head, 0, 0, 0, 0, 0};
            const HeadSums sums(call, backward.sums, *task, head);
            const bool want_gradients = want_query || want_key || sums.are_wanted();
            differentiate_extra_score(call, part, tile);
            if (!want_gradients && !want_value)
                continue;
            // Tiles that are the first to write need no zeros there.
            const int64_t keys = key_length - key_begin;
            const Span all = visible_queries(call, extent, key_begin, keys);
            const bool is_single = keys > 0 && keys <= BLOCK_KEYS && all.end - all.begin == extent.query_length;
            if (want_query && !is_single)
                clear(dq, extent.query_length, call.dim);
            for (tile.key = key_begin; tile.key < key_length; tile.key += BLOCK_KEYS) {
                tile.keys = smaller(BLOCK_KEYS, key_length - tile.key);
                float *const tile_dk = dk + tile.key * dim, *const tile_dv = dv + tile.key * value_dim;
                const Span rows = visible_queries(call, extent, tile.key, tile.keys);
                if (rows.begin == rows.end) {
                    if (want_key)
                        clear(tile_dk, tile.keys, call.dim);
                    if (want_value)
                        clear(tile_dv, tile.keys, call.value_dim);
                    continue;
                }
                part.load_keys(tile);
                for (tile.row = rows.begin; tile.row < rows.end; tile.row += BLOCK_QUERIES) {
                    tile.rows = smaller(BLOCK_QUERIES, rows.end - tile.row);
                    const bool whole = part.is_whole(tile);
                    part.load_queries(tile, !whole);
                    part.compute(tile, whole, want_gradients, sums);
                    const bool adds = head > first_head || tile.row > rows.begin;
                    if (want_value)
                        multiply<true>(adds, tile.keys, call.value_dim, tile.rows, part.weights, part.stride, part.dout,
                                       tile_dv);
                    if (want_key)
                        multiply<true>(adds, tile.keys, call.dim, tile.rows, part.gradients, part.stride, part.query,
                                       tile_dk);
                    if (want_query)
                        multiply<false>(!is_single, tile.rows, call.dim, tile.keys, part.gradients, part.stride,
                                        part.key_rows, dq + tile.row * dim);
                }
            }
            if (want_query)
                scatter(dq, call.scale, backward.dq, task->sequence, head, extent.query_first, extent.query_length,
                        call.dim);
        }
        if (want_key)
            write_keys(backward.dk, *task, extent, dk, call.scale, call.dim);
        if (want_value)
            write_keys(backward.dv, *task, extent, dv, call.dropout.seed ? call.dropout.scale : 1.0f, call.value_dim);
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/attention/gradients.h"
#include "cpu/attention/host.h"

namespace tfm {

namespace {

Heads heads_or_none(const MaybeTensor& x) { return x ? heads_of(*x) : Heads{}; }

// Fills what there is of the gradients.
void backward_into(const AttentionInputs& inputs, const Cotangents& given, const Heads& dq, const Heads& dk,
                   const Heads& dv, const MaybeTensor& dbias, const MaybeTensor& drelative) {
    const Attention& call = inputs.call;
    const BiasSumTensors biases(inputs, dbias, drelative);
    const AttentionBackward backward{call, given, dq, dk, dv, biases.sums};
    // Of each sequence, what a head of it costs.
    std::vector<int64_t> works;
    for (int64_t sequence = 0; sequence < inputs.sequences(); ++sequence) {
        const Extent& extent = inputs.extents[sequence];
        int64_t work = 0;
        for (int64_t first = 0; first < extent.query_length; first += BLOCK_QUERIES) {
            const int64_t rows = std::min(BLOCK_QUERIES, extent.query_length - first);
            work += rows * seen_keys(call, extent, first, rows) * call.group;
        }
        works.push_back(work);
    }
    Tasks tasks;
    for (int64_t first = 0; first < inputs.sequences(); first += biases.sums.each)
        for (int64_t head = 0; head < call.heads / call.group; ++head)
            for (int64_t sequence = first; sequence < std::min(first + biases.sums.each, inputs.sequences());
                 ++sequence)
                tasks.add({sequence, head, 0, 0}, works[sequence], sequence == first);
    if (dq.data || dk.data || dv.data || call.extra_gradients || dbias || drelative)
        tasks.run(3 * call.dim + 2 * call.value_dim, BackwardScratch{call}.floats,
                  [&](const Task* all, int64_t begin, int64_t end, float* scratch) {
                      TFM_RUN(attention_backward, backward, all, begin, end, scratch);
                  });
    biases.store();
}

using Gradients = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

Gradients attention_backward(const arguments::AttentionBackward& a) {
    const AttentionInputs inputs(a);
    const MaybeTensor dq = gradient_like(a.wanted[0], a.query), dk = gradient_like(a.wanted[1], a.key),
                      dv = gradient_like(a.wanted[2], a.value), dbias = gradient_like(a.wanted[3], a.bias),
                      drelative = gradient_like(a.wanted[5], a.relative_bias);
    backward_into(inputs, cotangents(a), heads_or_none(dq), heads_or_none(dk), heads_or_none(dv), dbias, drelative);
    return {dq, dk, dv, dbias, extra_score_gradient(inputs.extra), drelative};
}

// Of views of one projection, key and value or query, key and value: their gradients lie in one tensor [parts, ...] as
// the views do, so that the projection's gradient needs no copy.
std::tuple<MaybeTensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor>
attention_backward_joined(const arguments::AttentionBackwardJoined& a) {
    STD_TORCH_CHECK(a.parts == 2 || a.parts == 3, "parts: expected 2 or 3, got ", a.parts);
    const AttentionInputs inputs(a);
    const MaybeTensor dq = gradient_like(a.wanted[0] && a.parts == 2, a.query),
                      dbias = gradient_like(a.wanted[3], a.bias),
                      drelative = gradient_like(a.wanted[5], a.relative_bias);
    Tensor joined = joined_rows(a.key, a.parts);
    const auto part = [&](int64_t place) { return heads_of(torch::stable::select(joined, 0, place)); };
    backward_into(inputs, cotangents(a), a.parts == 3 ? part(0) : heads_or_none(dq), part(a.parts - 2),
                  part(a.parts - 1), dbias, drelative);
    return {dq, joined, dbias, extra_score_gradient(inputs.extra), drelative};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::AttentionBackward, attention_backward>(m);
    implement<arguments::AttentionBackwardJoined, attention_backward_joined>(m);
}

} // namespace tfm

#endif
