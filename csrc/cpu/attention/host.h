// What the operators of attention share on the host: the call from its tensors, and tasks shared among threads.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "common/attention.h"
#include "cpu/attention/call.h"
#include "cpu/rows.h"

namespace tfm {

inline Heads heads_of(const Tensor& x) {
    const bool narrow = width_of(x.scalar_type()) == Width::BFLOAT16;
    STD_TORCH_CHECK(narrow || x.scalar_type() == ScalarType::Float, "attention: expected float32 or bfloat16");
    if (x.dim() == 4)
        return {x.data_ptr(), narrow, x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    return {x.data_ptr(), narrow, 0, x.stride(1), x.stride(0), x.stride(2)};
}

// As above, 0 along dimensions of size 1.
inline Heads broadcast_heads(const MaybeTensor& x) {
    if (!x)
        return {};
    const auto step = [&](int64_t dim) { return x->size(dim) == 1 ? 0 : x->stride(dim); };
    return {x->data_ptr(), heads_of(*x).narrow, step(0), step(1), step(2), x->stride(3)};
}

inline Bits bits_of(const MaybeTensor& x) {
    if (!x)
        return {};
    const auto step = [&](int64_t dim) { return x->size(dim) == 1 ? 0 : x->stride(dim); };
    return {static_cast<const int32_t*>(x->data_ptr()), step(0), step(1), x->dim() == 4 ? step(2) : 0};
}

inline int64_t words_of(int64_t keys) { return (keys + WORD_KEYS - 1) / WORD_KEYS; }

// The bits of a dense bool [B, Sk], rows of whole words.
inline std::vector<int32_t> packed(const Tensor& mask) {
    const int64_t rows = mask.size(0), keys = mask.size(1), width = words_of(keys);
    std::vector<int32_t> found(rows * width);
    const uint8_t* from = static_cast<const uint8_t*>(mask.const_data_ptr());
    for (int64_t row = 0; row < rows; ++row, from += keys)
        for (int64_t word = 0; word < width; ++word) {
            const int64_t first = word * WORD_KEYS, count = std::min(keys - first, WORD_KEYS);
            uint32_t bits = 0;
            for (int64_t i = 0; i < count; ++i)
                bits |= static_cast<uint32_t>(from[first + i] != 0) << i;
            found[row * width + word] = static_cast<int32_t>(bits);
        }
    return found;
}

// Of [B, H, S] or packed [N, H].
inline RowNumbers row_numbers(const Tensor& x) {
    float* const data = static_cast<float*>(x.data_ptr());
    return x.dim() == 3 ? RowNumbers{data, x.stride(0), x.stride(1), x.stride(2)}
                        : RowNumbers{data, 0, x.stride(1), x.stride(0)};
}

// Of what tfm/operators/attention's row_statistics is: [2, B, H, S] or packed [2, N, H].
inline RowStatistics statistics_of(const Tensor& x) {
    // Views of the two halves would be two more calls of torch.
    const bool is_padded = x.dim() == 4;
    RowStatistics found{{static_cast<float*>(x.data_ptr()), is_padded ? x.stride(1) : 0, x.stride(2),
                         is_padded ? x.stride(3) : x.stride(1)}};
    found.logs = found.tops;
    found.logs.data += x.stride(0);
    return found;
}

// The call, and the vectors that it points into.
struct AttentionInputs {
    std::vector<Extent> extents;
    std::vector<float> relative_bias;
    std::vector<int32_t> key_bits; // of the mask of the keys
    ExtraScoreTensors extra;
    Attention call;

    // Of the arguments of Attention, or of an operator that has them among its own.
    template <class Arguments>
    explicit AttentionInputs(const Arguments& a) : extra(a) {
        const int64_t sequences = sequences_of(a);
        extents.assign(sequences, {0, a.query.size(a.query.dim() - 2), 0, 0, 0, 0, a.start});
        if (a.cu_seq_q)
            locate(numbers_of<int64_t>(*a.cu_seq_q), numbers_of<int64_t>(*a.cu_seq_k));
        else
            for (Extent& extent : extents)
                extent.key_length = extent.key_rows = a.key.size(2);
        if (a.key_lengths) {
            const auto lengths = numbers_of<int64_t>(*a.key_lengths);
            for (int64_t i = 0; i < sequences; ++i)
                extents[i].key_length = std::clamp<int64_t>(lengths[i], 0, extents[i].key_rows);
        }
        if (a.key_mask) {
            key_bits = packed(*a.key_mask);
            leave_out_padding({key_bits.data(), words_of(a.max_k), 0, 0});
        }
        if (a.reach && !a.cu_seq_q && a.reach->size(1) == 1)
            leave_out_padding(bits_of(a.reach));
        if (a.starts) {
            const auto given = numbers_of<int64_t>(*a.starts);
            for (int64_t i = 0; i < sequences; ++i)
                extents[i].start = std::clamp<int64_t>(given[i], -(1 << 29), 1 << 29);
        }
        if (a.relative_bias)
            relative_bias = numbers_of<float>(torch::stable::contiguous(*a.relative_bias));
        const int64_t last = a.query.dim() - 1, heads = a.query.size(1), key_heads = a.key.size(1);
        call = {
            .query = heads_of(a.query),
            .key = heads_of(a.key),
            .value = heads_of(a.value),
            .bias = broadcast_heads(a.bias),
            .relative_bias = {a.relative_bias ? relative_bias.data() : nullptr,
                              a.relative_bias ? a.relative_bias->size(1) / 2 : 0},
            // Of a mask with one row for all queries there is the reach alone.
            .words = bits_of(a.words ? a.words : a.reach),
            .keys = {a.key_mask ? key_bits.data() : nullptr, words_of(a.max_k), 0, 0},
            .reach = bits_of(a.reach),
            .extra_scores = matrix(extra.scores),
            .extra_gradients = data_of<float>(extra.partials),
            .extents = extents.data(),
            .heads = heads,
            .group = key_heads == 0 ? 1 : heads / key_heads,
            .dim = a.query.size(last),
            .value_dim = a.value.size(last),
            .longest_query = longest(&Extent::query_length),
            .longest_key = longest(&Extent::key_length),
            .left = a.left.value_or(OPEN),
            .right = a.right.value_or(OPEN),
            .inner = static_cast<float>(a.softcap ? a.scale / *a.softcap : a.scale),
            .outer = static_cast<float>(a.softcap.value_or(0.0)),
            .scale = static_cast<float>(a.scale),
            .dropout = dropout_of(a.seed, a.dropout_p, a.site),
        };
    }

    int64_t sequences() const { return static_cast<int64_t>(extents.size()); }

private:
    void locate(const std::vector<int64_t>& queries, const std::vector<int64_t>& keys) {
        for (size_t i = 0; i < extents.size(); ++i) {
            const int64_t key_length = keys[i + 1] - keys[i];
            extents[i] = {queries[i],      queries[i + 1] - queries[i], keys[i], key_length, 0, key_length,
                          extents[i].start};
        }
    }

    // Keys in words before the first with a bit, and those behind the last bit.
    void leave_out_padding(const Bits& rows) {
        for (size_t i = 0; i < extents.size(); ++i) {
            const int32_t* const words = rows.data + i * rows.sequence;
            int64_t begin = extents[i].key_begin / WORD_KEYS, end = (extents[i].key_length + WORD_KEYS - 1) / WORD_KEYS;
            while (begin < end && words[begin] == 0)
                ++begin;
            while (begin < end && words[end - 1] == 0)
                --end;
            const int64_t last = begin < end ? end * WORD_KEYS - __builtin_clz(words[end - 1]) : 0;
            extents[i].key_length = std::min(extents[i].key_length, last);
            extents[i].key_begin = std::min(begin * WORD_KEYS, extents[i].key_length);
        }
    }

    int64_t longest(int64_t Extent::* length) const {
        int64_t found = 1;
        for (const Extent& extent : extents)
            found = std::max(found, extent.*length);
        return found;
    }
};

// Keys that a block of queries goes over: what its time goes to.
inline int64_t seen_keys(const Attention& call, const Extent& extent, int64_t first, int64_t rows) {
    const int64_t begin = std::max(first + extent.start - call.left, extent.key_begin);
    return std::max<int64_t>(std::min(first + rows + extent.start + call.right, extent.key_length) - begin, 0);
}

// Scratch memory of this thread, kept for its next call: fresh pages would cost more than a short attention.
inline float* scratch_memory(int64_t floats) {
    struct Free {
        void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
    };
    static thread_local std::unique_ptr<float[], Free> memory;
    static thread_local int64_t size = 0;
    if (size < floats) {
        memory.reset();
        memory.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
        size = floats;
    }
    return memory.get();
}

// Below so many multiply-adds a second thread costs more than it does.
constexpr int64_t PRODUCTS_PER_THREAD = int64_t(1) << 19;

// Tasks in order, shared among threads by their work rather than their number: sequences differ in length.
class Tasks {
public:
    // Unless it `may_begin` a share, whoever has the task before has it, too.
    void add(const Task& task, int64_t work, bool may_begin = true) {
        tasks.push_back(task);
        begins.push_back(may_begin ? total : begins.back());
        // Even an empty task is written by somebody.
        total += work + 64;
    }

    // kernel(tasks, begin, end, scratch), in parallel where `products` for each unit of work are worth it.
    template <class Kernel>
    void run(int64_t products, int64_t floats, const Kernel& kernel) const {
        const auto place = [&](int64_t work) {
            return std::lower_bound(begins.begin(), begins.end(), work) - begins.begin();
        };
        share(total, products, PRODUCTS_PER_THREAD, [&](int64_t begin, int64_t end) {
            kernel(tasks.data(), place(begin), place(end), scratch_memory(floats));
        });
    }

private:
    std::vector<Task> tasks;
    std::vector<int64_t> begins;
    int64_t total = 0;
};

} // namespace tfm
