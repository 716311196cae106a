// Attention of one query a sequence over a cache of keys and values, for CPUs: kernels/decode_attention.py gives the
// mathematics.
//
// A task is a key head of a row, with the query heads that share it. It writes the latest key and value to their place
// in the cache, lists where the row's keys lie, and reads them there once: a vector of keys at a time, each multiplied
// by the query lane by lane, whose products are then added up across. No key is copied or transposed, as it pays to do
// for many queries. The scores stay whole in scratch memory, so that nothing is rescaled; the values are read once,
// too, a few of them into as many sums as hide the latency of an addition. Query heads that share a key head take turns
// at a tile of its keys while that lies in the cache.
//
// What a task computes depends on its place alone, never on the thread: the same bits on any number of them.
#include "cpu/isa.h"

#include "cpu/decode_attention/call.h"

namespace tfm {

TFM_KERNEL(decode_attention, const DecodeAttention& call, int64_t begin, int64_t end, float* scratch)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/attention/row_products.h"
#include "cpu/decode_attention/places.h"

namespace tfm::TFM_ISA {

namespace {

template <class T>
void attend(const DecodeAttention& call, int64_t row, int64_t head, const DecodeScratch& at, float* scratch) {
    const int64_t keys = keys_of(call, row), first_head = head * call.group;
    const int64_t query_stride = padded(call.dim), score_stride = padded(call.longest);
    const int64_t sum_stride = padded(call.value_dim);
    float *const query = scratch + at.query, *const scores = scratch + at.scores, *const sums = scratch + at.sums;
    int64_t* const key_places = reinterpret_cast<int64_t*>(scratch + at.key_places);
    int64_t* const value_places = reinterpret_cast<int64_t*>(scratch + at.value_places);
    for (int64_t i = 0; i < call.group * sum_stride; i += WIDTH)
        store(sums + i, Floats{});
    if (keys > 0) {
        if (call.key.data) {
            copy_row(place_of<T>(call.key, row, 0, head), place_of<T>(call.key_cache, row, keys - 1, head), call.dim);
            copy_row(place_of<T>(call.value, row, 0, head), place_of<T>(call.value_cache, row, keys - 1, head),
                     call.value_dim);
        }
        list_places(call, call.key_cache, row, keys, head, key_places);
        list_places(call, call.value_cache, row, keys, head, value_places);
        for (int64_t member = 0; member < call.group; ++member) {
            const T* const from = place_of<T>(call.query, row, 0, first_head + member);
            for (int64_t column = 0; column < call.dim; column += WIDTH)
                store(query + member * query_stride + column, load(from + column, call.dim - column));
        }
    }
    float* const totals = scratch + at.totals; // the largest scores first
    for (int64_t member = 0; member < call.group; ++member)
        totals[member] = -INFINITE;
    const T *const key_rows = static_cast<const T*>(call.key_cache.data), *const value_rows = static_cast<const T*>(
                                                                              call.value_cache.data);
    for (int64_t first = 0; first < keys; first += BLOCK_KEYS)
        for (int64_t member = 0; member < call.group; ++member) {
            const auto place = [&](int64_t key) __attribute__((always_inline)) { return key_places[first + key]; };
            const float top = maximum(score(key_rows, place, smaller(keys - first, BLOCK_KEYS),
                                            member == 0 ? keys - first : 0, query + member * query_stride, call.dim,
                                            call.scale, scores + member * score_stride + first));
            totals[member] = top > totals[member] ? top : totals[member];
        }
    for (int64_t member = 0; member < call.group; ++member) {
        float* const weights = scores + member * score_stride;
        const Floats top = broadcast(totals[member]);
        Floats total{};
        for (int64_t key = 0; key < keys; key += WIDTH) {
            const Floats weight = exp2((load(weights + key) - top) * LOG2E);
            store(weights + key, weight);
            total += weight;
        }
        totals[member] = sum(total);
    }
    for (int64_t first = 0; first < keys; first += BLOCK_KEYS)
        for (int64_t member = 0; member < call.group; ++member)
            weigh_values(value_rows, value_places + first, scores + member * score_stride + first,
                         smaller(keys - first, BLOCK_KEYS), call.value_dim, sums + member * sum_stride);
    for (int64_t member = 0; member < call.group; ++member) {
        T* const output = place_of<T>(call.output, row, 0, first_head + member);
        const float share = keys > 0 ? 1.0f / totals[member] : 0.0f;
        for (int64_t column = 0; column < call.value_dim; column += WIDTH)
            store(output + column, load(sums + member * sum_stride + column) * share, call.value_dim - column);
    }
}

} // namespace

void decode_attention(const DecodeAttention& call, int64_t begin, int64_t end, float* scratch) {
    const DecodeScratch at{call};
    for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / call.key_heads, head = task % call.key_heads;
        call.narrow ? attend<BFloat16>(call, row, head, at, scratch) : attend<float>(call, row, head, at, scratch);
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/attention/host.h"
#include "cpu/integers.h"
#include "operators/decode_attention.h"

namespace tfm {

namespace {

HeadRows head_rows(const Tensor& x) {
    if (x.dim() == 4)
        return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
    return {x.data_ptr(), x.stride(0), 0, x.stride(1)};
}

void check_parents(const DecodeAttention& call, int64_t rows, int64_t cache_rows) {
    for (int64_t row = 0; row < rows; ++row) {
        const int32_t* const parents = call.parents + row * call.parents_row;
        for (int64_t key = 0; key < keys_of(call, row) - (call.key.data ? 1 : 0); ++key)
            check_inside("parents", parents[key * call.parents_place], cache_rows);
    }
}

// Rows' tasks in order, shared among threads by their keys rather than their number: rows differ in length.
void run(const DecodeAttention& call, int64_t rows) {
    std::vector<int64_t> begins{0}, works;
    for (int64_t row = 0; row < rows; ++row) {
        works.push_back((keys_of(call, row) + 16) * call.group);
        begins.push_back(begins.back() + works.back() * call.key_heads);
    }
    const auto task = [&](int64_t work) {
        const int64_t row = std::upper_bound(begins.begin(), begins.end(), work) - begins.begin() - 1;
        const int64_t head = row < rows ? (work - begins[row] + works[row] - 1) / works[row] : 0;
        return row * call.key_heads + head;
    };
    share(begins.back(), call.dim + call.value_dim, PRODUCTS_PER_THREAD, [&](int64_t begin, int64_t end) {
        float* const scratch = scratch_memory(DecodeScratch{call}.floats);
        TFM_RUN(decode_attention, call, task(begin), task(end), scratch);
    });
}

Tensor decode_attention(const arguments::DecodeAttention& a) {
    const int64_t rows = a.query.size(0), heads = a.query.size(1), key_heads = a.key_cache.size(2);
    Tensor output = empty({rows, heads, a.value_cache.size(3)}, a.query.scalar_type(), a.query);
    const Tensor queries = side_by_side(a.query);
    const MaybeTensor keys = a.key ? MaybeTensor(side_by_side(*a.key)) : a.key;
    const MaybeTensor values = a.value ? MaybeTensor(side_by_side(*a.value)) : a.value;
    DecodeAttention call{
        .query = head_rows(queries),
        .key = keys ? head_rows(*keys) : HeadRows{},
        .value = values ? head_rows(*values) : HeadRows{},
        .key_cache = head_rows(a.key_cache),
        .value_cache = head_rows(a.value_cache),
        .output = head_rows(output),
        .narrow = is_narrow(width_of(a.query.scalar_type())),
        .lengths = static_cast<const int32_t*>(a.lengths.const_data_ptr()),
        .parents = data_of<const int32_t>(a.parents),
        .length_stride = a.lengths.stride(0),
        .parents_row = a.parents ? a.parents->stride(0) : 0,
        .parents_place = a.parents ? a.parents->stride(1) : 0,
        .key_heads = key_heads,
        .group = key_heads == 0 ? 1 : heads / key_heads,
        .dim = a.query.size(2),
        .value_dim = a.value_cache.size(3),
        .capacity = a.key_cache.size(1),
        .longest = 1,
        .scale = static_cast<float>(a.scale),
    };
    for (int64_t row = 0; row < rows; ++row)
        call.longest = std::max(call.longest, keys_of(call, row));
    if (call.parents)
        check_parents(call, rows, a.key_cache.size(0));
    run(call, rows);
    return output;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) { implement<arguments::DecodeAttention, decode_attention>(m); }

} // namespace tfm

#endif
