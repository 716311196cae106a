// What the forward and the backward of attention over few keys are told, and what follows from it: where a sequence
// lies, which keys a query sees, what a score is.
//
// The rules are those of kernels/attention/visible.py. With position(i) = i + start, query i may attend to key j where
//
//     j < key_length      position(i) - left <= j      j <= position(i) + right      its bit of the mask is set
//
// and its score is inner · q·k, or outer · tanh(inner · q·k) under a softcap, plus the bias. With the largest score of
// its row, top, a weight is exp2((s - top) · log2(e) - log2 Σ exp(s - top)): the difference comes first, since a score
// may be finfo.min, whose product with log2(e) is no number.
#pragma once

#include "common/philox.h"
#include "cuda/matrix.cuh"
#include "cuda/mma.cuh"

namespace tfm::cuda::short_attention {

constexpr float LOG2E = 1.4426950408889634f;
// What code is compiled for, 0 for the host: chips' compilers need different registers for the same kernel.
#ifdef __CUDA_ARCH__
constexpr int ARCHITECTURE = __CUDA_ARCH__;
#else
constexpr int ARCHITECTURE = 0;
#endif

// Of a sequence; and the widest rows.
constexpr int MOST_KEYS = 256, MOST_QUERIES = 256, MOST_COLUMNS = 64;
// Farther than any key, and the sum of three such numbers still fits 32 bits.
constexpr int FAR = 1 << 29;

__device__ __forceinline__ float number(const Matrix& from, int64_t place) {
    return at(from, place, [](const auto* found) { return widen(*found); });
}

// A matrix of rows for each (sequence, head), by steps in elements; packed, the step from sequence to sequence is 0.
struct Matrices {
    void* data;
    int64_t sequence, head, row, column;
    bool by_chunks; // every eight elements from a multiple of 8 on are 16 aligned bytes

    template <class T>
    __device__ __forceinline__ T* rows(int64_t of_sequence, int64_t of_head, int64_t first_row) const {
        return static_cast<T*>(data) + (of_sequence * sequence + of_head * head + first_row * row);
    }
};

// One attention, as tfm/operators/attention states it.
struct Call {
    Matrices query, key, value;
    // Steps of the next three are 0 along dimensions of size 1; keys lie side by side.
    Matrix bias;
    int64_t bias_sequence, bias_head;
    const int32_t* words;
    int64_t words_sequence, words_head, words_row;
    const int32_t* reach;
    int64_t reach_sequence, reach_head;
    Matrix extra_scores;    // of each head, one more in every row, of a key without a value; without data: none
    float* extra_gradients; // [sequences, heads], each of its own queries; null: not wanted
    Integers cu_seq_q, cu_seq_k, key_lengths, starts;
    // Of each query the largest score and, so many elements behind it, log2 Σ exp(s - top); neighbours lie side by
    // side.
    float* tops;
    int64_t tops_sequence, tops_head, to_logs;
    int sequences, heads, group, query_size, key_size, dim, value_dim;
    int start, left, right; // a side below 0 is open
    float inner, outer;     // outer 0: no softcap
    Dropout dropout;

    __device__ __forceinline__ const int32_t* reach_of(int64_t sequence, int64_t head) const {
        return reach ? reach + sequence * reach_sequence + head * reach_head : nullptr;
    }
    __device__ __forceinline__ float* tops_of(int64_t sequence, int64_t head, int64_t row) const {
        return tops + (sequence * tops_sequence + head * tops_head + row);
    }
};

// The gradients that the backward forms; null where one is not wanted.
struct Gradients {
    Matrices out;     // given
    const float* lse; // given, may be null
    int64_t lse_sequence, lse_head, lse_row;
    Matrices query, key, value;
    float scale;
};

struct Span {
    int begin, end;

    __device__ __forceinline__ bool has(int i) const { return begin <= i && i < end; }
    __device__ __forceinline__ bool meets(int first, int last) const { return first < end && begin < last; }
};

struct Sequence {
    int index, query_first, key_first, query_length, key_length, position;

    __device__ __forceinline__ Sequence(const Call& call, int index)
        : index(index), query_first(0), key_first(0), query_length(call.query_size), key_length(call.key_size),
          position(call.start) {
        if (call.cu_seq_q.data) {
            query_first = static_cast<int>(call.cu_seq_q[index]), key_first = static_cast<int>(call.cu_seq_k[index]);
            query_length = static_cast<int>(call.cu_seq_q[index + 1]) - query_first;
            // No longer than the room that the caller's max_k was given.
            key_length = min(static_cast<int>(call.cu_seq_k[index + 1]) - key_first, key_length);
        } else if (call.key_lengths.data) {
            key_length = static_cast<int>(min(max(call.key_lengths[index], int64_t{0}), int64_t{key_length}));
        }
        if (call.starts.data)
            position = static_cast<int>(min(max(call.starts[index], int64_t{-FAR}), int64_t{FAR}));
    }

    // The keys that some query of these rows sees by length and window; may end before it begins.
    __device__ __forceinline__ Span visible(const Call& call, int first_row, int last_row) const {
        return {call.left < 0 ? 0 : max(first_row + position - call.left, 0),
                call.right < 0 ? key_length : min(last_row + position + call.right + 1, key_length)};
    }
};

__device__ __forceinline__ bool is_reached(const int32_t* reach, int key) {
    return !reach || (reach[key / 32] >> (key % 32) & 1);
}

// What one head's mask adds to its scores, and which it forbids.
struct Mask {
    Matrix bias;
    const int32_t* bits;
    int64_t bias_first, bits_row;

    __device__ __forceinline__ Mask(const Call& call, int64_t sequence, int64_t head)
        : bias(call.bias), bits(nullptr), bias_first(sequence * call.bias_sequence + head * call.bias_head),
          bits_row(call.words_row) {
        if (call.words) {
            bits = call.words + sequence * call.words_sequence + head * call.words_head;
        } else if (call.reach) {
            // A mask with one row for all queries is its own reach.
            bits = call.reach_of(sequence, head);
            bits_row = 0;
        }
    }

    // Of a query, whether it may attend to each of the 16 keys from first_key on, a multiple of 16.
    __device__ __forceinline__ uint32_t sixteen(int64_t row, int first_key) const {
        return bits ? static_cast<uint32_t>(bits[row * bits_row + first_key / 32]) >> (first_key % 32) : 0xffff;
    }

    __device__ __forceinline__ float add_bias(float score, int64_t row, int key) const {
        if (!bias.data)
            return score;
        const float added = number(bias, bias_first + row * bias.stride + key);
        // -inf stays -inf, whatever the score.
        return added == -INFINITY ? -INFINITY : __fadd_rn(score, added);
    }
};

// (score, slope) of q·k; the derivative of the score by q·k is scale · slope. Rounded products: what adds to a score,
// or subtracts, must not be fused with one of them, or forward and backward would not agree on the score.
template <bool MAY_BEND>
__device__ __forceinline__ float2 score_and_slope(const Call& call, float product) {
    if (!MAY_BEND || call.outer == 0.0f)
        return make_float2(__fmul_rn(product, call.inner), 1.0f);
    const float bent = tanhf(product * call.inner);
    return make_float2(__fmul_rn(bent, call.outer), 1.0f - bent * bent);
}

// Calls run<T, DIM, DROPS, EXTRAS>() with what the call needs.
template <class Run>
void choose(const Call& call, bool has_more, Width width, const Run& run) {
    const auto with_type = [&]<class T>() {
        const auto with_dim = [&]<int DIM>() {
            const bool drops = call.dropout.seed;
            const bool extras =
                has_more || call.bias.data || call.reach || call.extra_scores.data || call.outer != 0.0f;
            if (drops)
                extras ? run.template operator()<T, DIM, true, true>() : run.template operator()<T, DIM, true, false>();
            else
                extras ? run.template operator()<T, DIM, false, true>()
                       : run.template operator()<T, DIM, false, false>();
        };
        if (call.dim > 32 || call.value_dim > 32)
            with_dim.template operator()<64>();
        else
            with_dim.template operator()<32>();
    };
    if (width == Width::HALF)
        with_type.template operator()<__half>();
    else
        with_type.template operator()<__nv_bfloat16>();
}

} // namespace tfm::cuda::short_attention
