// The CPU kernels called from threads, for the thread sanitizer (tools/sanitize/native.py compiles this folder
// once for each instruction set). Each case runs twice, on one thread and on several that take their share of the
// units; the outputs must be the same to the bit, and no two threads may touch the same number.
//
// Another kernel: include its file in a file of its operation, write a function that gives its Case, and name the
// operation in case.h and below.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int THREADS = 4, INPUTS = 8;
constexpr int64_t INPUT_SIZE = 2 * ROWS * COLUMNS;

// All outputs begin as bytes of `fill`: one that is not written, or only added to, differs from one run to the next.
Memory outputs_of(const Case& item, int threads, uint8_t fill) {
    Memory outputs;
    for (const Output& output : item.outputs) {
        outputs.emplace_back(output.bytes(), fill);
        if (output.initial)
            std::memcpy(outputs.back().data(), output.initial, output.bytes());
    }
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread)
        running.emplace_back(item.run, std::ref(outputs), item.units * thread / threads,
                             item.units * (thread + 1) / threads);
    for (std::thread& thread : running)
        thread.join();
    return outputs;
}

bool has_nan(const Output& output, const std::vector<uint8_t>& bytes) {
    for (int64_t i = 0; i < output.count; ++i) {
        uint32_t bits = 0;
        if (output.narrow)
            std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, &bytes[2 * i], 2);
        else
            std::memcpy(&bits, &bytes[4 * i], 4);
        if ((bits & 0x7FFFFFFF) > 0x7F800000)
            return true;
    }
    return false;
}

const char* verdict(const Case& item) {
    const Memory alone = outputs_of(item, 1, 0xFF), shared = outputs_of(item, THREADS, 0);
    for (size_t i = 0; i < alone.size(); ++i)
        if (has_nan(item.outputs[i], alone[i]))
            return "NOT A NUMBER, or not written";
    return alone == shared ? nullptr : "DIFFERS, or not written";
}

} // namespace

void* input(int place, bool narrow) {
    struct Input {
        std::vector<float> wide;
        std::vector<uint16_t> narrow;
    };
    static std::vector<Input> inputs = [] {
        std::vector<Input> made(INPUTS);
        uint32_t state = 1;
        for (Input& item : made)
            for (int64_t i = 0; i < INPUT_SIZE; ++i) {
                const float number = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;
                uint32_t bits;
                std::memcpy(&bits, &number, sizeof(bits));
                item.wide.push_back(number);
                item.narrow.push_back(static_cast<uint16_t>(bits >> 16));
            }
        return made;
    }();
    return narrow ? static_cast<void*>(inputs.at(place).narrow.data()) : inputs.at(place).wide.data();
}

} // namespace tfm::threads

int main() {
    using namespace tfm::threads;
    int failures = 0;
    for (const Cases& cases : {norm_cases(), feed_forward_cases(), cross_entropy_cases(), embedding_cases(),
                               attention_cases(), decode_attention_cases(), rotary_cases(), causal_conv1d_cases(),
                               wkv_cases(), rg_lru_cases(), selective_scan_cases()})
        for (const Case& item : cases) {
            const char* const wrong = verdict(item);
            std::printf("%s: %s\n", item.name.c_str(), wrong ? wrong : "the same bits on 1 thread and on several");
            failures += wrong != nullptr;
        }
    return failures;
}
