// Sums over the lanes of a warp, over the warps of a row's team, and over what blocks have summed; each in one order.
#pragma once

#include "cuda/matrix.cuh"

namespace tfm::cuda {

// Every lane gets the sum; x and y are two sums at once.
__device__ inline float2 warp_sum(float2 value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value.x += __shfl_xor_sync(ALL_LANES, value.x, distance);
        value.y += __shfl_xor_sync(ALL_LANES, value.y, distance);
    }
    return value;
}

// The threads that share a row: `warps` neighbouring warps of a block. All teams of a block sum at the same time.
struct Team {
    int warps;
    float2* slots; // shared memory: two for each warp of the block
    int turn = 0;

    // The bytes of `slots`.
    static __host__ __device__ constexpr size_t bytes(int block_threads) {
        return 2 * sizeof(float2) * (block_threads / WARP);
    }

    __device__ int index() const { return threadIdx.x / WARP / warps; }
    __device__ int lane() const { return threadIdx.x - index() * lanes(); }
    __device__ int lanes() const { return warps * WARP; }

    __device__ float2 sum(float2 value) {
        value = warp_sum(value);
        if (warps == 1)
            return value;
        // Two sets of slots in turn: one barrier for each sum, since nobody is two sums ahead of another.
        float2* const mine = slots + turn * (blockDim.x / WARP);
        turn ^= 1;
        if (threadIdx.x % WARP == 0)
            mine[threadIdx.x / WARP] = value;
        __syncthreads();
        float2 total = make_float2(0.0f, 0.0f);
        for (int warp = 0; warp < warps; ++warp) {
            const float2 part = mine[index() * warps + warp];
            total.x += part.x;
            total.y += part.y;
        }
        return total;
    }

    __device__ float sum(float value) { return sum(make_float2(value, 0.0f)).x; }
};

constexpr int MAX_SUMS = 3;
struct Sums {
    Matrix to[MAX_SUMS];
};

constexpr int SUM_GROUPS = 32;

// Each block sums 32 columns of a part of partials [programs, parts, columns]: every 32nd program by one warp, in
// order, then the warps' sums, in order.
static __global__ void sum_partials_kernel(const float* partials, Sums sums, int programs, int columns) {
    float* const totals = shared_memory<float>();
    const int column = blockIdx.x * WARP + threadIdx.x % WARP, group = threadIdx.x / WARP;
    const int part = blockIdx.y, parts = gridDim.y;
    float total = 0.0f;
    if (column < columns) {
#pragma unroll 4
        for (int program = group; program < programs; program += SUM_GROUPS)
            total += partials[(static_cast<int64_t>(program) * parts + part) * columns + column];
    }
    totals[threadIdx.x] = total;
    __syncthreads();
    if (group > 0 || column >= columns)
        return;
    for (int other = 1; other < SUM_GROUPS; ++other)
        total += totals[other * WARP + threadIdx.x];
    const Matrix to = part == 0 ? sums.to[0] : part == 1 ? sums.to[1] : sums.to[2];
    at(to, column, [&](auto* place) { narrow(total, *place); });
}

// Fills each of the given vectors with the sum of its part of partials, fp32 [programs, parts, columns].
inline void sum_partials(const Tensor& partials, std::initializer_list<MaybeTensor> vectors, const OnDevice& device) {
    Sums sums{};
    int parts = 0;
    for (const MaybeTensor& vector : vectors)
        if (vector)
            sums.to[parts++] = {vector->data_ptr(), width_of(vector->scalar_type()), 0};
    const int programs = static_cast<int>(partials.size(0)), columns = static_cast<int>(partials.size(2));
    if (columns > 0)
        launch(sum_partials_kernel, dim3(divide_up(columns, WARP), parts), dim3(SUM_GROUPS * WARP),
               SUM_GROUPS * WARP * sizeof(float), device.stream, static_cast<const float*>(partials.data_ptr()), sums,
               programs, columns);
}

} // namespace tfm::cuda
