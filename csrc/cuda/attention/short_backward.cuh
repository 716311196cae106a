// Attention over few keys, backward: dq, dk and dv of a sequence and a key head by one block, without atomics.
//
// With the scores s, the weights p = exp2((s - top) · log2(e) - log2 Σ) and the dropout mask of the forward, all formed
// again:
//
//     dv = dropout(p)ᵀ dout      dp = dropout(dout vᵀ)              delta = Σ p · dp - dlse
//     ds = p · (dp - delta)      dk = scale · (ds · slope)ᵀ q       dq = scale · (ds · slope) k
//
// (Dao et al., "FlashAttention", NeurIPS 2022, appendix B.4. Σ p · dp, over all keys, is their Σ dout · out, without
// the rounding of out, and out is not read. The last term of delta is the gradient of the log of Σ exp(s).)
//
// The data's path: k and v of the head lie in shared memory, and each warp owns 16 keys, whose dk and dv it sums in
// registers while the queries of the group's heads pass by, 16 at a time, in their order: no sum is shared, so none
// needs an order. Tiles have keys as rows, as dk and dv have: p and ds are the first factors of their products as they
// lie in registers. Two things cross the warps, through shared memory: their shares of delta, added in the keys' order,
// and ds, rounded, from which one warp after another forms 16 columns of dq over all keys. So a tile of queries takes
// two barriers, and the next one flies in by cp.async meanwhile. Keys up to 16 take one warp, and no barrier of the
// block: four pairs share a block. Tiles that the window or the lengths leave nothing are skipped. Above 64 keys dv has
// a launch of its own, and its registers: six products.
//
// Shared memory, dim being 32 or 64: 4 · dim bytes a key, rounded up to 16 keys, 36 bytes a key for ds and delta, and
// 128 · (dim + 2) for two tiles of q, dout and statistics. At 64: 12.8 KB a pair of at most 16 keys, 21.9 KB at
// 48, 81.2 KB at 256.
#pragma once

#include "cuda/attention/extra_score.cuh"
#include "cuda/attention/short_tiles.cuh"

namespace tfm::cuda::short_attention {

// What a launch forms: with more than 64 keys dv has one of its own, since the sums of both dk and dv would fill the
// registers of so many warps.
enum class Part { ALL, VALUE, REST };

// On a multiprocessor, with most_warps: 4 leave a lane 128 registers, 3 leave it 168. Where 128 do not hold a kernel,
// it is not held to them.
__host__ __device__ constexpr int least_blocks(Part part, int dim, bool drops, bool extras) {
    const bool fits = ARCHITECTURE == 900 && !(drops && dim > 32);
    return part != Part::ALL || extras ? 1 : fits ? 4 : 3;
}

constexpr int most_warps(Part part) { return part == Part::ALL ? 4 : 16; }

// What lies in shared memory, in elements of 2 bytes: two tiles of queries, their dout and, as fp32, their tops and the
// logs; then for each 16 keys k, v, ds and, as fp32, their shares of delta.
template <int DIM>
struct Room {
    static constexpr int D_OUT = MATRIX<DIM>, TOPS = 2 * MATRIX<DIM>, QUERIES = TOPS + 4 * TILE;
    static constexpr int VALUE = MATRIX<DIM>, D_SCORES = 2 * MATRIX<DIM>, SHARES = D_SCORES + MATRIX<TILE>,
                         KEYS = SHARES + 2 * TILE;

    static __host__ __device__ int of_pair(int warps) { return 2 * QUERIES + warps * KEYS; }
};

// The four columns of a tile of scores that a lane holds, as queries: left and right product, two of each.
__device__ __forceinline__ int place_of(int i) { return i / 2 * CHUNK + threadIdx.x % 4 * 2 + i % 2; }

template <class T, int DIM, bool DROPS, bool EXTRAS, Part PART>
__global__ void __launch_bounds__(most_warps(PART) * WARP, least_blocks(PART, DIM, DROPS, EXTRAS))
    backward_kernel(Call call, Gradients gradients, int warps) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int pair_of_block = threadIdx.x / WARP / warps, warp = threadIdx.x / WARP % warps;
    const int pair = blockIdx.x * (blockDim.x / WARP / warps) + pair_of_block;
    const int key_heads = call.heads / call.group;
    if (pair >= call.sequences * key_heads)
        return;
    const int key_head = pair % key_heads;
    const Sequence sequence(call, pair / key_heads);
    const int length = sequence.query_length, own_key = warp * TILE;

    using Shared = Room<DIM>;
    T* const arriving = shared_memory<T>() + pair_of_block * Shared::of_pair(warps);
    T* const keys = arriving + 2 * Shared::QUERIES;
    T* const own = keys + warp * Shared::KEYS;

    const int thread = warp * WARP + lane, threads = warps * WARP;
    {
        const Span seen = sequence.visible(call, 0, length - 1);
        const auto inside = [&](int row) {
            bool reached = false;
            for (int member = 0; member < call.group && !reached; ++member)
                reached = is_reached(call.reach_of(sequence.index, key_head * call.group + member), row);
            return seen.has(row) && reached;
        };
        const int first = seen.begin / TILE * TILE, end = (seen.end + TILE - 1) / TILE * TILE;
        copy_rows<T, DIM>(keys, Shared::KEYS, call.key, call.key.rows<T>(sequence.index, key_head, sequence.key_first),
                          call.dim, first, end, thread, threads, inside);
        copy_rows<T, DIM>(keys + Shared::VALUE, Shared::KEYS, call.value,
                          call.value.rows<T>(sequence.index, key_head, sequence.key_first), call.value_dim, first, end,
                          thread, threads, inside);
    }

    // A step is a tile of queries of one of the group's heads.
    const int tiles = (length + TILE - 1) / TILE;
    const auto has_step = [&](int step) { return step < formed_here(tiles) * call.group; };
    const auto copy_step = [&](int step) {
        if (has_step(step)) {
            const int head = key_head * call.group + step / tiles, index = formed_here(sequence.index);
            const float* const tops = call.tops_of(index, head, sequence.query_first);
            // A query without keys may hold anything.
            const auto inside = [&](int row) {
                const Span seen = sequence.visible(call, row, row);
                return row < length && seen.begin < seen.end && (!call.reach || tops[row] > -INFINITY);
            };
            const int first = step % tiles * TILE;
            T* const query = arriving + step % 2 * Shared::QUERIES;
            copy_rows<T, DIM>(query, 0, call.query, call.query.rows<T>(index, head, sequence.query_first), call.dim,
                              first, first + TILE, thread, threads, inside);
            copy_rows<T, DIM>(query + Shared::D_OUT, 0, gradients.out,
                              gradients.out.rows<T>(index, head, sequence.query_first), call.value_dim, first,
                              first + TILE, thread, threads, inside);
            if (thread < 2 * TILE)
                start_copy_of_word(reinterpret_cast<float*>(query + Shared::TOPS) + thread,
                                   tops + min(first + thread % TILE, length - 1) + thread / TILE * call.to_logs);
        }
        end_copy_group();
    };
    copy_step(0);
    copy_step(1);
    wait_for_copies<1>();
    meet(warps);

    const float keep_scale = DROPS ? call.dropout.scale : 1.0f;
    float d_key[DIM / CHUNK][4] = {}, d_value[DIM / CHUNK][4] = {}, d_extra = 0.0f;
    const auto adds_extra = [&] { return EXTRAS && PART != Part::VALUE && call.extra_gradients && warp == 0; };
    for (int step = 0; has_step(step); ++step) {
        const int head = key_head * call.group + step / tiles;
        const int first_row = step % tiles * TILE;
        const T* const query = arriving + step % 2 * Shared::QUERIES;
        const T* const d_out = query + Shared::D_OUT;
        const auto seen_keys = [&](int row) { return sequence.visible(call, row, min(row + TILE, length) - 1); };
        const bool is_active = seen_keys(first_row).meets(own_key, own_key + TILE);

        // Of the lane's four queries: top, and the sum's logarithm, infinite where every weight is 0.
        const float* const tops = reinterpret_cast<const float*>(query + Shared::TOPS);
        const auto top_of = [&](int i) { return tops[place_of(i)] == -INFINITY ? 0.0f : tops[place_of(i)]; };
        const auto log_of = [&](int i) {
            const bool is_empty = tops[place_of(i)] == -INFINITY || first_row + place_of(i) >= length;
            return is_empty ? INFINITY : tops[TILE + place_of(i)];
        };

        // Keys g and g + 8 of two queries, then of two more: p, dp and, under a softcap, the slope.
        float weights[2][4] = {}, d_weights[2][4] = {}, slopes[2][4];
        if (is_active) {
            if (PART != Part::VALUE)
                dot_rows<T, DIM>(d_weights[0], d_weights[1], own + Shared::VALUE, d_out);
            dot_rows<T, DIM>(weights[0], weights[1], own, query);
            uint32_t kept[2] = {~0u, ~0u};
            if (DROPS) {
                // Of the eight lanes with these queries each decides eight keys of one query.
                const int row = first_row + place_of(g / 2);
                const uint32_t octet = kept_octet(call.dropout, own_key / 8 + g % 2, row,
                                                  static_cast<uint32_t>(sequence.index * call.heads + head));
                const uint32_t half = joined(joined(octet, 8, 4), 16, 8);
                const uint32_t other = __shfl_xor_sync(ALL_LANES, half, 16);
                kept[0] = g < 4 ? half : other;
                kept[1] = g < 4 ? other : half;
            }
            const auto keeps = [&](int i, int half) {
                return !DROPS || (kept[i / 2] >> (16 * (i % 2) + 8 * half + g) & 1);
            };
            const Mask mask(call, sequence.index, head);
            float share[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = min(first_row + place_of(i), length - 1);
                const float top = top_of(i), log = log_of(i);
                const Span row_seen = sequence.visible(call, row, row);
                const uint32_t bits = EXTRAS ? mask.sixteen(row, own_key) : 0xffff;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int place = g + half * CHUNK;
                    float &p = weights[i / 2][2 * half + i % 2], &dp = d_weights[i / 2][2 * half + i % 2];
                    const bool allowed = row_seen.has(own_key + place) && (bits >> place & 1);
                    const float2 score = score_and_slope<EXTRAS>(call, p);
                    float biased = score.x;
                    if (EXTRAS) {
                        slopes[i / 2][2 * half + i % 2] = score.y;
                        if (allowed)
                            biased = mask.add_bias(biased, row, own_key + place);
                    }
                    p = allowed ? fast_exp2(fminf(biased - top, 0.0f) * LOG2E - log) : 0.0f;
                    // Where the weight is 0 another head's mask may have left NaN.
                    dp = p == 0.0f || !keeps(i, half) ? 0.0f : dp * keep_scale;
                    share[i] += p * dp;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int bit = 4; bit < WARP; bit *= 2)
                    share[i] += __shfl_xor_sync(ALL_LANES, share[i], bit);
                if (g == 0)
                    reinterpret_cast<float*>(own + Shared::SHARES)[place_of(i)] = share[i];
            }
            if (PART != Part::REST && gradients.value.data) {
                uint32_t factors[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int side = i / 2, half = i % 2;
                    const float (&p)[4] = weights[side];
                    factors[i] = packed<T>(keeps(2 * side, half) ? p[2 * half] : 0.0f,
                                           keeps(2 * side + 1, half) ? p[2 * half + 1] : 0.0f);
                }
                add_weighted<T, DIM>(d_value, factors, d_out);
            }
        }
        meet(warps);

        const Span seen = seen_keys(formed_here(first_row));
        const int first_tile = seen.begin / TILE, end_tile = (seen.end + TILE - 1) / TILE;
        if (PART != Part::VALUE && (is_active || adds_extra())) {
            float delta[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                delta[i] = 0.0f;
#pragma unroll 1
                for (int tile = first_tile; tile < end_tile; ++tile)
                    delta[i] +=
                        reinterpret_cast<const float*>(keys + tile * Shared::KEYS + Shared::SHARES)[place_of(i)];
                if (EXTRAS && gradients.lse && log_of(i) < INFINITY) {
                    const int64_t row = sequence.query_first + first_row + place_of(i);
                    delta[i] -= gradients.lse[sequence.index * gradients.lse_sequence + head * gradients.lse_head +
                                              row * gradients.lse_row];
                }
            }
            if (adds_extra())
                add_extra_gradient(d_extra, call, head, top_of, log_of, delta);
            if (is_active) {
                uint32_t d_scores[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int side = i / 2, half = i % 2;
                    float ds[2];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        ds[j] = weights[side][2 * half + j] * (d_weights[side][2 * half + j] - delta[2 * side + j]);
                        if (EXTRAS)
                            ds[j] *= slopes[side][2 * half + j];
                    }
                    d_scores[i] = packed<T>(ds[0], ds[1]);
                    T* const place = own + Shared::D_SCORES + swizzled<TILE>(g + half * CHUNK, side) + 2 * t;
                    *reinterpret_cast<uint32_t*>(place) = d_scores[i];
                }
                if (gradients.key.data)
                    add_weighted<T, DIM>(d_key, d_scores, query);
            }
        }
        if (adds_extra() && step % tiles == tiles - 1) {
            store_extra_gradient(call, sequence.index, head, d_extra);
            d_extra = 0.0f;
        }
        wait_for_copies<0>();
        meet(warps);

        // All are done with this tile of queries: the one after the next may take its place.
        copy_step(step + 2);
        if (PART != Part::VALUE && gradients.query.data) {
            const int index = formed_here(sequence.index);
            T* rows[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + g + half * CHUNK;
                rows[half] = row < length ? gradients.query.rows<T>(index, head, sequence.query_first + row) : nullptr;
            }
            // The columns go round among the warps, from step to step.
            const int units = (call.dim + TILE - 1) / TILE;
            for (int unit = (warp + step * (warps - 1) * units) % warps; unit < units; unit += warps) {
                float d_query[2][4] = {};
#pragma unroll 1
                for (int tile = first_tile; tile < end_tile; ++tile) {
                    uint32_t loaded[4], columns[4];
                    const T* const key = keys + tile * Shared::KEYS;
                    load_tile_transposed<TILE>(loaded, key + Shared::D_SCORES, 0);
                    const uint32_t d_scores[4] = {loaded[0], loaded[2], loaded[1], loaded[3]};
                    load_tile_transposed<DIM>(columns, key, 2 * unit);
                    multiply_add<T>(d_query[0], d_scores, columns[0], columns[1]);
                    multiply_add<T>(d_query[1], d_scores, columns[2], columns[3]);
                }
                store_tile<T>(rows, unit * TILE, call.dim, d_query[0], d_query[1], {gradients.scale, gradients.scale});
            }
        }
    }
    if (adds_extra() && tiles == 0)
        for (int member = 0; member < call.group; ++member)
            store_extra_gradient(call, sequence.index, key_head * call.group + member, 0.0f);

    // Behind its length a padded sequence has keys, too, and their gradients are 0.
    const int key_rows = call.cu_seq_k.data ? sequence.key_length : call.key_size;
    // Read again, so that no register holds it through the loop.
    const int key_first = call.cu_seq_k.data ? static_cast<int>(call.cu_seq_k[sequence.index]) : 0;
    const auto store = [&](const Matrices& to, int columns, const float (&sums)[DIM / CHUNK][4], float factor) {
        if (!to.data)
            return;
        T* rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = own_key + g + half * CHUNK;
            rows[half] = row < key_rows ? to.rows<T>(sequence.index, key_head, key_first + row) : nullptr;
        }
#pragma unroll
        for (int d = 0; d < DIM / TILE; ++d)
            store_tile<T>(rows, d * TILE, columns, sums[2 * d], sums[2 * d + 1], {factor, factor});
    };
    if (PART != Part::VALUE)
        store(gradients.key, call.dim, d_key, gradients.scale);
    if (PART != Part::REST)
        store(gradients.value, call.value_dim, d_value, keep_scale);
    wait_for_copies<0>();
}

} // namespace tfm::cuda::short_attention
