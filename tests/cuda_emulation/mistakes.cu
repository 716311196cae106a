// Kernels with one mistake each, and a right one, for tests of the emulation itself; x and y hold 256 floats.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>

namespace {
constexpr unsigned ALL = 0xffffffff;
using Kernel = void (*)(const float* x, float* y);

float* shared() { return reinterpret_cast<float*>(emulation::shared_memory()); }

// y[0] is the sum of x, by shuffles and one barrier; y[1] counts the even lanes of a warp.
__global__ void right(const float* x, float* y) {
    float value = x[threadIdx.x];
    for (int distance = 16; distance > 0; distance /= 2)
        value += __shfl_xor_sync(ALL, value, distance);
    if (threadIdx.x % 32 == 0)
        shared()[threadIdx.x / 32] = value;
    const unsigned even = __ballot_sync(ALL, threadIdx.x % 2 == 0);
    __syncthreads();
    if (threadIdx.x > 0)
        return;
    y[0] = shared()[0] + shared()[1] + shared()[2] + shared()[3];
    y[1] = __popc(even);
}

__global__ void reads_without_barrier(const float* x, float* y) {
    shared()[threadIdx.x] = 0.0f;
    __syncthreads();
    shared()[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    y[threadIdx.x] = shared()[(threadIdx.x + 1) % 128];
}

__global__ void overwrites_what_is_read(const float* x, float* y) {
    shared()[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const float next = shared()[(threadIdx.x + 1) % 128];
    shared()[threadIdx.x] = next;
    y[threadIdx.x] = next;
}

__global__ void takes_a_shuffle_for_a_barrier(const float* x, float* y) {
    shared()[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = __shfl_sync(ALL, x[threadIdx.x], 0);
    y[threadIdx.x] += shared()[threadIdx.x ^ 1];
}

__global__ void blocks_write_one_place(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

__global__ void reads_what_nobody_wrote(const float*, float* y) { y[threadIdx.x] = shared()[threadIdx.x]; }

__global__ void reads_beyond_shared_memory(const float* x, float* y) {
    shared()[threadIdx.x + 1] = x[threadIdx.x];
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void barrier_in_a_branch(const float* x, float* y) {
    if (threadIdx.x < 100)
        __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void shuffles_with_lanes_that_left(const float* x, float* y) {
    if (threadIdx.x % 32 == 7)
        return;
    y[threadIdx.x] = __shfl_xor_sync(ALL, x[threadIdx.x], 1);
}

__global__ void shuffles_from_outside_the_mask(const float* x, float* y) {
    const unsigned mask = threadIdx.x % 2 == 0 ? 0x55555555 : 0xaaaaaaaa;
    y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}

__global__ void masks_disagree(const float* x, float* y) {
    y[threadIdx.x] = __shfl_sync(threadIdx.x % 32 == 0 ? 0x3 : ALL, x[threadIdx.x], 0);
}

__global__ void crooked_vector(const float* x, float* y) {
    y[threadIdx.x] = reinterpret_cast<const float4*>(x + threadIdx.x)->x;
}

__global__ void outside_a_local_array(const float* x, float* y) {
    float values[4] = {x[0], x[1], x[2], x[3]};
    y[threadIdx.x] = values[threadIdx.x % 5];
}

constexpr Kernel KERNELS[] = {
    right,
    reads_without_barrier,
    overwrites_what_is_read,
    takes_a_shuffle_for_a_barrier,
    blocks_write_one_place,
    reads_what_nobody_wrote,
    reads_beyond_shared_memory,
    barrier_in_a_branch,
    shuffles_with_lanes_that_left,
    shuffles_from_outside_the_mask,
    masks_disagree,
    crooked_vector,
    outside_a_local_array,
};

struct Run {
    Kernel kernel;
    const float* x;
    float* y;
};
} // namespace

// What went wrong, empty where nothing did. Two blocks for the kernel whose mistake that is, one for the others.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(int index, const float* x, float* y) {
    static char failure[600];
    failure[0] = 0;
    Run run{KERNELS[index], x, y};
    const auto body = [](void* argument) {
        const auto& [kernel, from, to] = *static_cast<Run*>(argument);
        kernel(from, to);
    };
    try {
        emulation::run(dim3(run.kernel == blocks_write_one_place ? 2 : 1), dim3(128), 128 * sizeof(float), body, &run);
    } catch (const std::exception& error) {
        std::snprintf(failure, sizeof failure, "%s", error.what());
    }
    return failure;
}
