// The instructions of csrc/cuda/mma.cuh, by the PTX ISA's tables of fragments; see there.
//
// A product's terms are summed in fp32 in the order of their columns. An asynchronous copy lands when its thread waits
// for it; what reads it before finds NaN. It counts as a write when it starts, too.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

#include <iterator>
#include <type_traits>

// What it does between lanes is no access of the kernel's.
#define UNANNOUNCED __attribute__((no_sanitize("thread")))

namespace emulation {
struct Product {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

template <class T>
UNANNOUNCED float half_of(uint32_t word, int half) {
    const auto bits = static_cast<uint16_t>(word >> 16 * half);
    if constexpr (std::is_same_v<T, __half>)
        return __half2float(__half{bits});
    else
        return __bfloat162float(__nv_bfloat16{bits});
}

// Element (row, column) of A lies in lane 4 (row % 8) + column % 8 / 2, register row / 8 + 2 (column / 8); of B, with
// rows and columns exchanged, in register row / 8 alone.
template <class T>
UNANNOUNCED void multiply_lanes(void* const* lanes, unsigned) {
    float a[16][16], b[16][8];
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) {
            const auto* from = static_cast<const Product*>(lanes[4 * (row % 8) + k % 8 / 2]);
            a[row][k] = half_of<T>(from->a[row / 8 + 2 * (k / 8)], k % 2);
        }
    for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) {
            const auto* from = static_cast<const Product*>(lanes[4 * column + k % 8 / 2]);
            b[k][column] = half_of<T>(from->b[k / 8], k % 2);
        }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            float& c = static_cast<const Product*>(lanes[lane])->c[i];
            for (int k = 0; k < 16; ++k)
                c += a[lane / 4 + 8 * (i / 2)][k] * b[k][lane % 4 * 2 + i % 2];
        }
}

struct Fetch {
    uint32_t* r;
    const void* row;
};

template <bool TRANSPOSED>
UNANNOUNCED void fetch_lanes(void* const* lanes, unsigned) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        const uint16_t* rows[8];
        for (int row = 0; row < 8; ++row)
            rows[row] = static_cast<const uint16_t*>(static_cast<const Fetch*>(lanes[8 * matrix + row])->row);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint32_t low = TRANSPOSED ? rows[t][g] : rows[g][t],
                           high = TRANSPOSED ? rows[t + 1][g] : rows[g][t + 1];
            static_cast<const Fetch*>(lanes[lane])->r[matrix] = low | high << 16;
        }
    }
}

struct Copy {
    void* shared;
    int bytes;
    unsigned char value[16];
};
// What a thread has started and not waited for: `ends` tells its groups apart.
struct Copies {
    Copy copies[1024];
    int count, ends[16], groups;
};
inline Copies copies_of_thread[1024];

UNANNOUNCED inline Copies& my_copies() {
    return copies_of_thread[(place.thread.z * place.block_size.y + place.thread.y) * place.block_size.x +
                            place.thread.x];
}
} // namespace emulation

namespace tfm::cuda {

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::Product mine{c, a, {b0, b1}};
    emulation::warp_collective(0xffffffff, "mma.sync", &mine, emulation::multiply_lanes<T>);
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        emulation::fail("ldmatrix at a crooked address");
    emulation::touch(row, 16, false);
    emulation::Fetch mine{r, row};
    emulation::warp_collective(0xffffffff, "ldmatrix", &mine, emulation::fetch_lanes<TRANSPOSED>);
}

UNANNOUNCED inline void start_copy(void* shared, const void* global, bool inside, int bytes = 16) {
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes != 0)
        emulation::fail("cp.async at a crooked address");
    emulation::Copies& mine = emulation::my_copies();
    if (mine.count == std::ssize(mine.copies))
        emulation::fail("more copies are under way than the emulation holds");
    emulation::Copy& copy = mine.copies[mine.count++];
    copy.shared = shared, copy.bytes = bytes;
    emulation::touch(shared, bytes, true);
    if (inside)
        emulation::touch(global, bytes, false);
    for (int i = 0; i < bytes; ++i)
        copy.value[i] = inside ? static_cast<const unsigned char*>(global)[i] : 0;
    for (int i = 0; i < bytes; ++i)
        static_cast<unsigned char*>(shared)[i] = 0xff;
}

inline void start_copy_of_word(float* shared, const float* global) { start_copy(shared, global, true, 4); }

UNANNOUNCED inline void end_copy_group() {
    emulation::Copies& mine = emulation::my_copies();
    if (mine.groups == std::ssize(mine.ends))
        emulation::fail("more groups of copies than the emulation holds");
    mine.ends[mine.groups++] = mine.count;
}

template <int PENDING>
UNANNOUNCED void wait_for_copies() {
    emulation::Copies& mine = emulation::my_copies();
    const int landing = mine.groups - PENDING;
    if (landing <= 0)
        return;
    const int landed = mine.ends[landing - 1];
    for (int i = 0; i < landed; ++i) {
        const emulation::Copy& copy = mine.copies[i];
        emulation::touch(copy.shared, copy.bytes, true);
        for (int j = 0; j < copy.bytes; ++j)
            static_cast<unsigned char*>(copy.shared)[j] = copy.value[j];
    }
    for (int i = landed; i < mine.count; ++i)
        mine.copies[i - landed] = mine.copies[i];
    for (int i = landing; i < mine.groups; ++i)
        mine.ends[i - landing] = mine.ends[i] - landed;
    mine.count -= landed;
    mine.groups -= landing;
}

inline float fast_exp2(float x) {
    const float result = std::exp2(x);
    return result < 0x1p-126f ? 0.0f : result;
}

} // namespace tfm::cuda
