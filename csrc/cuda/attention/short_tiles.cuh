// Tiles of 16 rows in attention over few keys: how they come to shared memory, are multiplied, lose weights to dropout,
// and go back.
#pragma once

#include "cuda/attention/short.cuh"
#include "cuda/mma.cuh"

namespace tfm::cuda::short_attention {

// The same number; what follows from it is formed where it is used, and takes no registers before.
__device__ __forceinline__ int formed_here(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

// Whether dropout keeps each of eight neighbouring keys of a query: the bits of a byte.
__device__ __forceinline__ uint32_t kept_octet(const Dropout& dropout, int octet, int row, uint32_t head) {
    const Philox drawn = Philox::draw(octet, row, head, dropout.site, *dropout.seed);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        bits |= static_cast<uint32_t>(drawn.keeps(i, dropout.threshold)) << i;
    return bits;
}

// Numbers of `bits` bits, this lane's and that of the lane whose number differs in `lane_bit`, the lower lane's first.
__device__ __forceinline__ uint32_t joined(uint32_t mine, int bits, int lane_bit) {
    const uint32_t other = __shfl_xor_sync(ALL_LANES, mine, lane_bit);
    return threadIdx.x & lane_bit ? other | mine << bits : mine | other << bits;
}

// Tiles of rows [first, end) of a matrix to shared memory, `tile_step` elements from tile to tile, by `lanes` threads,
// of which this is one. Rows that are not `inside`, and the columns up to DIM, become 0. Chunks fly by cp.async, or
// element by element where strides are odd.
template <class T, int DIM, class Inside>
__device__ __forceinline__ void copy_rows(T* shared, int tile_step, const Matrices& from, const T* row_0, int columns,
                                          int first, int end, int lane, int lanes, Inside inside) {
    constexpr int CHUNKS = DIM / CHUNK;
    for (int i = first * CHUNKS + lane; i < end * CHUNKS; i += lanes) {
        const int row = i / CHUNKS, column = i % CHUNKS * CHUNK;
        const bool is_inside = column < columns && inside(row);
        const T* source = row_0 + row * from.row + column * from.column;
        T* target = shared + row / TILE * tile_step + swizzled<DIM>(row % TILE, i % CHUNKS);
        if (from.by_chunks) {
            start_copy(target, is_inside ? source : row_0, is_inside);
        } else {
            alignas(16) T chunk[CHUNK];
#pragma unroll
            for (int j = 0; j < CHUNK; ++j)
                chunk[j] = is_inside ? source[j * from.column] : T{};
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(chunk);
        }
    }
}

// The products of 16 rows with 8 others, and with the 8 after those.
template <class T, int DIM>
__device__ __forceinline__ void dot_rows(float (&left)[4], float (&right)[4], const T* rows, const T* others) {
#pragma unroll
    for (int k = 0; k < DIM / TILE; ++k) {
        uint32_t a[4], b[4];
        load_tile<DIM>(a, rows, 2 * k);
        load_tile<DIM>(b, others, 2 * k);
        multiply_add<T>(left, a, b[0], b[2]);
        multiply_add<T>(right, a, b[1], b[3]);
    }
}

// sums [16, DIM] += factors [16, 16] · rows [16, DIM].
template <class T, int DIM>
__device__ __forceinline__ void add_weighted(float (&sums)[DIM / CHUNK][4], const uint32_t (&factors)[4],
                                             const T* rows) {
#pragma unroll
    for (int d = 0; d < DIM / TILE; ++d) {
        uint32_t b[4];
        load_tile_transposed<DIM>(b, rows, 2 * d);
        multiply_add<T>(sums[2 * d], factors, b[0], b[1]);
        multiply_add<T>(sums[2 * d + 1], factors, b[2], b[3]);
    }
}

// Two products side by side, 16 columns from first_column on, to the rows g and g + 8, null where there is none, each
// times its factor. Neighbouring lanes exchange pairs, so that 32 bytes of a row are written at once.
template <class T>
__device__ __forceinline__ void store_tile(T* const (&rows)[2], int first_column, int columns, const float (&left)[4],
                                           const float (&right)[4], const float (&factors)[2]) {
    const int t = threadIdx.x % 4;
    const bool odd = t % 2;
    const int column = first_column + CHUNK * odd + t / 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t in_left = packed<T>(left[2 * half] * factors[half], left[2 * half + 1] * factors[half]);
        const uint32_t in_right = packed<T>(right[2 * half] * factors[half], right[2 * half + 1] * factors[half]);
        const uint32_t taken = __shfl_xor_sync(ALL_LANES, odd ? in_left : in_right, 1);
        if (rows[half] && column < columns)
            *reinterpret_cast<uint2*>(rows[half] + column) =
                odd ? make_uint2(taken, in_right) : make_uint2(in_left, taken);
    }
}

// The warps of one pair of a sequence and a head meet; a pair of one warp may share its block with others.
__device__ __forceinline__ void meet(int warps) {
    if (warps == 1)
        __syncwarp();
    else
        __syncthreads();
}

} // namespace tfm::cuda::short_attention
