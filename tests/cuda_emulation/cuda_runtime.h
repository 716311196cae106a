// CUDA on a CPU, for tests: with this folder first on the include path, a .cu file compiles as C++ and its kernels run.
//
//     g++ -x c++ -std=c++20 -O2 -g1 -fsanitize=thread,alignment,bounds -I tests/cuda_emulation -I csrc -c kernel.cu
//     g++ -std=c++20 -O2 -c scheduler.cpp race_check.cpp      and link all with plain `g++ -shared`: no libtsan
//
// - Every thread of a block is a fiber on one CPU thread; blocks run one after the other. A fiber runs until a barrier
//   or a warp's exchange makes it wait. Where threads that a barrier or a mask names never come, the launch fails.
// - -fsanitize=thread makes g++ announce each load and store; race_check.cpp answers in place of its library: two
//   threads that touch one place, one of them writing, without __syncthreads or (in a warp) __syncwarp between them,
//   fail the launch; so does shared memory read before it was written, or used beyond what was asked for.
// - Shuffles and votes order no memory, as CUDA's manual says. -fsanitize=alignment,bounds catch crooked vector loads
//   and indices outside local arrays.
// - Shared memory is the dynamic one alone: shared_memory<T>() of csrc/cuda/launch.cuh. `__shared__` does not compile.
// - A kernel is launched through launch() of csrc/cuda/launch.cuh; a failure becomes a std::runtime_error there.
// - An instruction of a whole warp (mma.sync, ldmatrix) is a function that calls emulation::warp_collective: each lane
//   gives the address of its operands and results, and the last lane to come does the work for all:
//
//       struct Payload { ...; };                              // on each lane's stack
//       emulation::warp_collective(0xffffffff, "mma", &mine, [](void* const* lanes, unsigned mask) { ... });
//
//   What it copies to or from memory it announces with emulation::touch(address, bytes, is_write), lane by lane.
// - TFM_CUDA_EMULATION is defined.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#define TFM_CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {
// Where the thread that runs now stands.
struct Place {
    dim3 thread, block, block_size, grid_size;
};
extern Place place;

using Combine = void (*)(void* const* lanes, unsigned mask);

// Runs body(argument) for each thread of each block.
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);
// Ends the launch with an error; called by a thread, it does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// The lanes of `mask` meet; the last one calls combine with the payloads of all lanes, null outside the mask.
void warp_collective(unsigned mask, const char* name, void* payload, Combine combine);
// A whole block meets; the result is how many of its threads gave true.
int block_barrier(bool predicate);
void warp_barrier(unsigned mask);
char* shared_memory();
void touch(const void* address, size_t bytes, bool is_write);

template <typename T>
struct Shuffled {
    T value, result;
    int source;
};

template <typename T>
T shuffle(unsigned mask, const char* name, T value, int source) {
    Shuffled<T> mine{value, value, source};
    warp_collective(mask, name, &mine, [](void* const* lanes, unsigned) {
        for (int lane = 0; lane < 32; ++lane)
            if (auto* to = static_cast<Shuffled<T>*>(lanes[lane])) {
                auto* from = static_cast<Shuffled<T>*>(lanes[to->source]);
                if (!from)
                    fail("lane %d shuffles from lane %d, which its mask does not name", lane, to->source);
                to->result = from->value;
            }
    });
    return mine.result;
}

inline int lane() {
    const auto& [thread, block, size, grid] = place;
    return ((thread.z * size.y + thread.y) * size.x + thread.x) % 32;
}
} // namespace emulation

#define threadIdx emulation::place.thread
#define blockIdx emulation::place.block
#define blockDim emulation::place.block_size
#define gridDim emulation::place.grid_size
constexpr int warpSize = 32;

inline void __syncthreads() { emulation::block_barrier(false); }
inline int __syncthreads_count(int predicate) { return emulation::block_barrier(predicate); }
inline int __syncthreads_or(int predicate) { return emulation::block_barrier(predicate) > 0; }
inline void __syncwarp(unsigned mask = 0xffffffff) { emulation::warp_barrier(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emulation::shuffle(mask, "__shfl_sync", value, (emulation::lane() & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int source = emulation::lane() ^ bits, first = emulation::lane() & ~(width - 1);
    return emulation::shuffle(mask, "__shfl_xor_sync", value, source < first + width ? source : emulation::lane());
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
    const int source = emulation::lane() + delta, last = emulation::lane() | (width - 1);
    return emulation::shuffle(mask, "__shfl_down_sync", value, source <= last ? source : emulation::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
    const int source = emulation::lane() - delta, first = emulation::lane() & ~(width - 1);
    return emulation::shuffle(mask, "__shfl_up_sync", value, source >= first ? source : emulation::lane());
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned votes = predicate != 0; // What a lane gives, then what it gets.
    emulation::warp_collective(mask, "__ballot_sync", &votes, [](void* const* lanes, unsigned) {
        unsigned all = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (lanes[lane])
                all |= *static_cast<unsigned*>(lanes[lane]) << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (lanes[lane])
                *static_cast<unsigned*>(lanes[lane]) = all;
    });
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<uint64_t>(x) * y >> 32; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T __ldcs(const T* address) {
    return *address;
}
template <typename T>
void __stcs(T* address, T value) {
    *address = value;
}

using cudaStream_t = void*;
