// A warp's tensor core instructions, by small functions: products, and the loads of their fragments.
//
// mma.sync m16n8k16 forms C [16, 8] += A [16, 16] B [16, 8] from registers. Of lane 4g + t the PTX ISA's tables say
//
//     A   a[0]: row g, columns 2t, 2t+1      a[1]: row g + 8      a[2]: row g, columns 2t + 8, 2t + 9      a[3]: both
//     B   b[0]: rows 2t, 2t+1 of column g    b[1]: rows 2t + 8, 2t + 9
//     C   c[0], c[1]: row g, columns 2t, 2t+1                     c[2], c[3]: row g + 8
//
// so that two neighbouring C, rounded and packed by pairs, are an A without any exchange. ldmatrix fetches four 8x8
// matrices from shared memory, row by row at addresses that the lanes give; lane 4g + t gets columns 2t, 2t+1 of row g,
// or, transposed, rows 2t, 2t+1 of column g. A 16x16 tile (row, columns) is fetched in the order
//
//     r[0]: rows 0-7, columns 0-7      r[1]: rows 8-15, columns 0-7      r[2]: rows 0-7, columns 8-15      r[3]: both
//
// which is an A as it stands. As B, where the tile's rows are B's columns: (r[0], r[2]) and (r[1], r[3]). Transposed,
// as B where its rows are B's rows: (r[0], r[1]) and (r[2], r[3]); as A where its rows are A's columns: r[0] r[2] r[1]
// r[3].
//
// Tiles lie in shared memory as rows of 16-byte chunks; `swizzled` says where. Eight rows' chunks of one column are
// then in eight different groups of banks, and ldmatrix meets no conflict.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

#include "cuda/launch.cuh"

#ifdef TFM_CUDA_EMULATION
#include <tensor_core.h>
#endif

namespace tfm::cuda {

constexpr int TILE = 16; // rows of A
constexpr int CHUNK = 8; // elements of 16 bytes

// Sixteen rows of DIM columns.
template <int DIM>
constexpr int MATRIX = TILE * DIM;

// The element of shared memory at which a chunk of a row begins, of DIM columns, 16, 32 or 64.
template <int DIM>
__device__ __forceinline__ int swizzled(int row, int chunk) {
    constexpr int CHUNKS = DIM / CHUNK;
    return row * DIM + (chunk ^ (row / (8 / CHUNKS) % CHUNKS)) * CHUNK;
}

// Two numbers rounded to T, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 both = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&both);
    } else {
        const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&both);
    }
}

#ifndef TFM_CUDA_EMULATION

template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* address) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
}

// Starts a copy of 16 bytes from global to shared memory, or of zeros where not `inside`.
__device__ __forceinline__ void start_copy(void* shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void start_copy_of_word(float* shared, const float* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// The copies started since the last call are a group.
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, all but its last PENDING groups. Other threads need a barrier besides.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 2^x within 2 ulp; results below the smallest normal number are 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

#endif

// Sixteen rows of a matrix in shared memory, and of their chunks this one and the next.
template <int DIM, class T>
__device__ __forceinline__ void load_tile(uint32_t (&r)[4], const T* rows, int chunk) {
    const int lane = threadIdx.x % WARP;
    load_matrices<false>(r, rows + swizzled<DIM>(lane % TILE, chunk + lane / TILE));
}

template <int DIM, class T>
__device__ __forceinline__ void load_tile_transposed(uint32_t (&r)[4], const T* rows, int chunk) {
    const int lane = threadIdx.x % WARP;
    load_matrices<true>(r, rows + swizzled<DIM>(lane % TILE, chunk + lane / TILE));
}

} // namespace tfm::cuda
