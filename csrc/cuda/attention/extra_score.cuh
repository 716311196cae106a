// The extra score: every row of a head has one more, of a key without a value, which the operator calls its `sinks`.
//
//     top = max(s, extra)      Σ = Σ exp(s - top) + exp(extra - top)
//     dextra = -Σ exp2((extra - top) · log2(e) - log2 Σ) · delta      over all queries; delta of short_backward.cuh
#pragma once

#include "cuda/attention/short.cuh"

namespace tfm::cuda::short_attention {

// Joins a head's extra score to a row's largest score and its Σ exp(s - top). Returns what earlier sums are to be
// multiplied by.
__device__ __forceinline__ float add_extra_score(const Call& call, int head, float& top, float& total) {
    const float score = number(call.extra_scores, head), higher = fmaxf(top, score);
    const float shrunk = fast_exp2((top - higher) * LOG2E);
    total = total * shrunk + fast_exp2((score - higher) * LOG2E);
    top = higher;
    return shrunk;
}

// Adds what four queries add to the gradient of a head's extra score. The logarithm of one without keys is infinite,
// and its delta may be anything.
template <class Top, class Log>
__device__ __forceinline__ void add_extra_gradient(float& sum, const Call& call, int head, const Top& top_of,
                                                   const Log& log_of, const float (&delta)[4]) {
    const float score = number(call.extra_scores, head);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        sum -= fast_exp2((score - top_of(i)) * LOG2E - log_of(i)) * (log_of(i) < INFINITY ? delta[i] : 0.0f);
}

// Of all queries of a head, whose sum is spread over four lanes.
__device__ __forceinline__ void store_extra_gradient(const Call& call, int sequence, int head, float sum) {
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    if (threadIdx.x % WARP == 0)
        call.extra_gradients[sequence * call.heads + head] = sum;
}

} // namespace tfm::cuda::short_attention
