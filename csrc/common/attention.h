// What the host parts of attention share on every device: how many sequences there are, tensors for results, and the
// extra score.
#pragma once

#include <algorithm>
#include <numeric>

#include "operators/attention.h"

namespace tfm {

// Of the arguments of Attention, or of an operator that has them among its own.
template <class Arguments>
int64_t sequences_of(const Arguments& a) {
    return a.cu_seq_q ? a.cu_seq_q->size(0) - 1 : a.query.size(0);
}

inline Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType type,
                            const Tensor& like) {
    using torch::stable::detail::from, torch::stable::detail::to;
    int32_t device_type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                    to<int32_t>(from(type)), device_type, like.get_device_index(),
                                                    &handle));
    return Tensor(handle);
}

// The dimensions of x but its last, as they lie in memory, outermost first.
inline std::vector<int64_t> memory_order(const Tensor& x) {
    std::vector<int64_t> order(x.dim() - 1);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
    return order;
}

// Empty, of the shape of x but for the last dimension, dense, its dimensions in memory as those of x are.
inline Tensor rows_like(const Tensor& x, int64_t columns) {
    std::vector<int64_t> shape = shape_of(x), strides(shape.size(), 1);
    shape.back() = columns;
    const std::vector<int64_t> order = memory_order(x);
    int64_t step = columns;
    for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
        strides[*dim] = step;
        step *= std::max<int64_t>(shape[*dim], 1);
    }
    return empty_strided(shape, strides, x.scalar_type(), x);
}

// Empty, as x is; none where it is not wanted.
inline MaybeTensor gradient_like(bool is_wanted, const MaybeTensor& x) {
    return is_wanted && x ? MaybeTensor(rows_like(*x, x->size(x->dim() - 1))) : MaybeTensor();
}

// Empty fp32, two numbers for each query and head: [2, B, Hq, Sq], or [2, Nq, Hq] whose heads lie apart.
inline Tensor row_statistics(const Tensor& query) {
    const int64_t batch = query.size(0), heads = query.size(1);
    if (query.dim() == 4)
        return empty({2, batch, heads, query.size(2)}, ScalarType::Float, query);
    return torch::stable::transpose(empty({2, heads, batch}, ScalarType::Float, query), 1, 2);
}

// What both kernels of attention_mask_bits are told of its mask [B, H, Sq, Sk], and its results, still empty.
struct MaskBitTensors {
    // Rows of words are whole tiles of so many keys: the kernels' longest.
    static constexpr int64_t KEYS_OF_A_ROW = 256;
    bool is_bool;
    bool has_one_row; // its reach is the row itself: the window is the attention's business
    int64_t batch, heads, queries, keys, width;
    Tensor words, reach;

    explicit MaskBitTensors(const arguments::AttentionMaskBits& a)
        : is_bool(a.mask.scalar_type() == ScalarType::Bool), has_one_row(a.mask.size(2) == 1 || a.mask.stride(2) == 0),
          batch(a.mask.size(0)), heads(a.mask.size(1)),
          queries(has_one_row ? std::min<int64_t>(a.mask.size(2), 1) : a.mask.size(2)), keys(a.mask.size(3)),
          width((keys + KEYS_OF_A_ROW - 1) / KEYS_OF_A_ROW * KEYS_OF_A_ROW / 32),
          words(empty({batch, heads, is_bool && !has_one_row ? queries : 0, width}, ScalarType::Int, a.mask)),
          reach(empty({a.starts && !has_one_row ? a.starts->size(0) : batch, heads, width}, ScalarType::Int, a.mask)) {}
};

// Each head's extra score, of a key without a value, which the operator calls its `sinks`.
struct ExtraScoreTensors {
    Vector scores;
    MaybeTensor partials; // fp32 [sequences, 1, heads], what each sequence adds to the gradient; none: not wanted

    // Of the arguments of attention or of its backward.
    template <class Arguments>
    explicit ExtraScoreTensors(const Arguments& a) : scores(a.sinks) {
        if constexpr (requires { a.wanted; })
            if (a.sinks && a.wanted[4])
                partials = empty({sequences_of(a), 1, a.sinks->size(0)}, ScalarType::Float, a.query);
    }
};

} // namespace tfm
