// What the cases share: a kernel, its inputs, and the memory that its threads write to.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "common/philox.h"
#include "cpu/matrix.h"

namespace tfm::threads {

constexpr int64_t ROWS = 203, COLUMNS = 131, BLOCK_ROWS = 32;
constexpr int64_t BLOCKS = (ROWS + BLOCK_ROWS - 1) / BLOCK_ROWS;

struct Output {
    int64_t count;                 // numbers
    bool narrow = false;           // bf16
    const void* initial = nullptr; // what it holds before, where the kernel works in place

    int64_t bytes() const { return count * (narrow ? 2 : 4); }
};

using Memory = std::vector<std::vector<uint8_t>>;

struct Case {
    std::string name;
    int64_t units; // what is shared: rows, blocks of rows, or tasks
    std::vector<Output> outputs;
    std::function<void(Memory& outputs, int64_t begin, int64_t end)> run;
};

using Cases = std::vector<Case>;

Cases feed_forward_cases();
Cases attention_cases();
Cases causal_conv1d_cases();
Cases cross_entropy_cases();
Cases decode_attention_cases();
Cases embedding_cases();
Cases norm_cases();
Cases rg_lru_cases();
Cases rotary_cases();
Cases selective_scan_cases();
Cases wkv_cases();

// Input number `place`, 0 to 7: 2 · ROWS · COLUMNS numbers from -1 to 1, as fp32 or as bf16.
void* input(int place, bool narrow = false);

inline float* floats(int place) { return static_cast<float*>(input(place)); }
inline float* floats(std::vector<uint8_t>& output) { return reinterpret_cast<float*>(output.data()); }

inline Matrix matrix(void* data, bool narrow = false, int64_t stride = COLUMNS) { return {data, narrow, stride}; }

// One number in ten is dropped.
inline Dropout dropout() {
    static const int64_t seed = 20170612;
    return {&seed, 6554, 65536.0f / (65536 - 6554), 3};
}

inline std::string named(const char* kernel, bool narrow) {
    return std::string(kernel) + (narrow ? ", bf16" : ", fp32");
}

} // namespace tfm::threads
