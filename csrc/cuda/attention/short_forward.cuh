// Attention over few keys, forward: all keys and values of a head in shared memory, a warp for each 16 queries.
//
//     top = max(s)      p = exp(s - top)      out = dropout(p) v / Σ p      statistics: top, log2 Σ p
//
// (short.cuh says what s is; "Attention Is All You Need", equation 1.) A query without keys gives 0, and -inf and 0 as
// its statistics.
//
// The data's path: rows of q, k and v come by cp.async, 16 bytes a lane, swizzled; ldmatrix hands them to the tensor
// cores; the scores of 32 keys stay in 16 registers a lane, are scaled, masked and exponentiated where they are, and
// are, packed by pairs, the first factor of p v: they never leave the registers. More than 32 keys pass in chunks of
// 32, and what is summed is rescaled where a chunk raises the maximum: so a lane needs 128 registers, not 160. Steps of
// 16 keys that a tile of queries does not see are skipped: a sentence costs what its own length costs, whatever the
// longest of its batch.
//
// A row's sums run through the same steps at any length of the batch: more padding, same bits.
//
// Up to 64 keys a pair of a sequence and a head has one warp, which goes through its queries tile by tile, and a block
// several pairs; above, a block has one pair and up to 8 warps, one for each tile of queries.
// Shared memory: 4 · dim bytes a key, rounded up to 16 keys, and 32 · dim bytes a warp, dim being 32 or 64. At 64: 6 KB
// a pair of at most 16 keys, 18 KB at 64, 80 KB a block at 256 keys.
#pragma once

#include "cuda/attention/extra_score.cuh"
#include "cuda/attention/short_tiles.cuh"

namespace tfm::cuda::short_attention {

constexpr int STEPS = 2, KEYS = STEPS * TILE; // of a chunk
constexpr int MAX_WARPS = 8;
// Up to so many tiles of keys one warp serves a pair.
constexpr int MOST_TILES_OF_A_WARP = 4;

// Two blocks on a multiprocessor leave a lane 128 registers. Where these do not hold the kernel, it is not held to
// them.
constexpr int LEAST_BLOCKS = ARCHITECTURE >= 1000 ? 1 : 2;

template <class T, int DIM, bool DROPS, bool EXTRAS>
__global__ void __launch_bounds__(MAX_WARPS* WARP, EXTRAS ? 1 : LEAST_BLOCKS)
    forward_kernel(Call call, Matrices out, int warps, int key_tiles) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int pair_of_block = threadIdx.x / WARP / warps, warp = threadIdx.x / WARP % warps;
    const int pair = blockIdx.x * (blockDim.x / WARP / warps) + pair_of_block;
    if (pair >= call.sequences * call.heads)
        return;
    const int head = pair % call.heads;
    const Sequence sequence(call, pair / call.heads);
    const int length = sequence.query_length;
    if (static_cast<int>(blockIdx.y) * warps * TILE >= length)
        return;

    // A tile of each warp's queries, then for each 16 keys a tile of k and one of v.
    T* const query = shared_memory<T>() + (pair_of_block * (2 * key_tiles + warps) + warp) * MATRIX<DIM>;
    T* const keys = query + (warps - warp) * MATRIX<DIM>;
    const T* const queries = call.query.rows<T>(sequence.index, head, sequence.query_first);
    const auto copy_queries = [&](int first_row) {
        copy_rows<T, DIM>(query, 0, call.query, queries, call.dim, first_row, first_row + TILE, lane, WARP,
                          [&](int row) { return row < length; });
    };
    {
        const Span seen = sequence.visible(call, 0, length - 1);
        const int32_t* const reach = call.reach_of(sequence.index, head);
        const auto inside = [&](int row) { return seen.has(row) && is_reached(reach, row); };
        // Tiles of keys that some query sees; what lies in them and is not seen is 0.
        const int first = seen.begin / TILE * TILE, end = (seen.end + TILE - 1) / TILE * TILE;
        const int key_head = head / call.group;
        const int thread = warp * WARP + lane;
        copy_rows<T, DIM>(keys, 2 * MATRIX<DIM>, call.key,
                          call.key.rows<T>(sequence.index, key_head, sequence.key_first), call.dim, first, end, thread,
                          warps * WARP, inside);
        copy_rows<T, DIM>(keys + MATRIX<DIM>, 2 * MATRIX<DIM>, call.value,
                          call.value.rows<T>(sequence.index, key_head, sequence.key_first), call.value_dim, first, end,
                          thread, warps * WARP, inside);
    }
    int first_row = (blockIdx.y * warps + warp) * TILE;
    copy_queries(first_row);
    end_copy_group();
    wait_for_copies<0>();
    meet(warps);

    const Mask mask(call, sequence.index, head);
    const uint32_t dropout_head = static_cast<uint32_t>(pair);
    T* const outputs = out.rows<T>(sequence.index, head, sequence.query_first);
    float* const tops = call.tops_of(sequence.index, head, sequence.query_first);

    const int rows_apart = gridDim.y * warps * TILE;
    for (; first_row < length; first_row += rows_apart) {
        uint32_t q[DIM / TILE][4];
#pragma unroll
        for (int k = 0; k < DIM / TILE; ++k)
            load_tile<DIM>(q[k], query, 2 * k);
        __syncwarp();
        if (first_row + rows_apart < length)
            copy_queries(first_row + rows_apart);
        end_copy_group();

        const int rows[2] = {first_row + g, first_row + g + 8};
        const Span seen = sequence.visible(call, first_row, min(first_row + TILE, length) - 1);
        const Span row_seen[2] = {sequence.visible(call, rows[0], rows[0]), sequence.visible(call, rows[1], rows[1])};
        float sums[DIM / CHUNK][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
        for (int first_key = seen.begin / KEYS * KEYS; first_key < seen.end; first_key += KEYS) {
            float scores[2 * STEPS][4], chunk_top[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int tile_key = first_key + step * TILE;
                if (!seen.meets(tile_key, tile_key + TILE))
                    continue;
                float (&left)[4] = scores[2 * step], (&right)[4] = scores[2 * step + 1];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    left[i] = right[i] = 0.0f;
#pragma unroll
                for (int k = 0; k < DIM / TILE; ++k) {
                    uint32_t key[4];
                    load_tile<DIM>(key, keys + tile_key / TILE * (2 * MATRIX<DIM>), 2 * k);
                    multiply_add<T>(left, q[k], key[0], key[2]);
                    multiply_add<T>(right, q[k], key[1], key[3]);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // A row beyond the last has no mask; what it gets is not stored.
                    const uint32_t bits = EXTRAS ? mask.sixteen(min(rows[half], length - 1), tile_key) : 0xffff;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& score = scores[2 * step + i / 2][2 * half + i % 2];
                        const int place = i / 2 * CHUNK + 2 * t + i % 2;
                        const bool allowed = row_seen[half].has(tile_key + place) && (bits >> place & 1);
                        score = score_and_slope<EXTRAS>(call, score).x;
                        if (EXTRAS && allowed)
                            score = mask.add_bias(score, min(rows[half], length - 1), tile_key + place);
                        score = allowed ? score : -INFINITY;
                        chunk_top[half] = fmaxf(chunk_top[half], score);
                    }
                }
            }

            float base[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                chunk_top[half] = fmaxf(chunk_top[half], __shfl_xor_sync(ALL_LANES, chunk_top[half], 1));
                chunk_top[half] = fmaxf(chunk_top[half], __shfl_xor_sync(ALL_LANES, chunk_top[half], 2));
                const float higher = fmaxf(top[half], chunk_top[half]);
                base[half] = higher == -INFINITY ? 0.0f : higher;
                const float factor = fast_exp2((top[half] - base[half]) * LOG2E);
                top[half] = higher;
                total[half] *= factor;
#pragma unroll
                for (int d = 0; d < DIM / CHUNK; ++d) {
                    sums[d][2 * half] *= factor;
                    sums[d][2 * half + 1] *= factor;
                }
            }
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int tile_key = first_key + step * TILE;
                if (!seen.meets(tile_key, tile_key + TILE))
                    continue;
                uint32_t kept = ~0u;
                if (DROPS) {
                    // Of the quad's four lanes each decides eight keys of one row: (row 0 | 1, octet 0 | 1).
                    const int row = first_row + g + t / 2 * 8;
                    kept = kept_octet(call.dropout, tile_key / 8 + t % 2, row, dropout_head);
                    kept = joined(joined(kept, 8, 1), 16, 2);
                }
                uint32_t weights[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int half = i % 2, side = i / 2;
                    float p[2];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        p[j] = fast_exp2((scores[2 * step + side][2 * half + j] - base[half]) * LOG2E);
                        total[half] += p[j];
                        if (DROPS)
                            p[j] = kept >> (16 * half + 8 * side + 2 * t + j) & 1 ? p[j] : 0.0f;
                    }
                    weights[i] = packed<T>(p[0], p[1]);
                }
                add_weighted<T, DIM>(sums, weights, keys + (tile_key / TILE * 2 + 1) * MATRIX<DIM>);
            }
        }

        float factors[2];
        T* to[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
            total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
            const bool is_empty = top[half] == -INFINITY;
            float factor = DROPS ? call.dropout.scale : 1.0f;
            if (EXTRAS && call.extra_scores.data && !is_empty)
                factor *= add_extra_score(call, head, top[half], total[half]);
            factors[half] = factor / total[half];
            if (is_empty) {
                factors[half] = 0.0f;
#pragma unroll
                for (int d = 0; d < DIM / CHUNK; ++d)
                    sums[d][2 * half] = sums[d][2 * half + 1] = 0.0f;
            }
            to[half] = rows[half] < length ? outputs + rows[half] * out.row : nullptr;
            if (t == 0 && rows[half] < length) {
                tops[rows[half]] = top[half];
                tops[call.to_logs + rows[half]] = is_empty ? 0.0f : log2f(total[half]);
            }
        }
#pragma unroll
        for (int d = 0; d < DIM / TILE; ++d)
            store_tile<T>(to, d * TILE, call.value_dim, sums[2 * d], sums[2 * d + 1], factors);
        wait_for_copies<0>();
        __syncwarp();
    }
}

} // namespace tfm::cuda::short_attention
