// The CPU kernels called from threads, for the thread sanitizer (benchmarks/native_sanitizers.py compiles it once for
// each instruction set). Each case runs twice, on one thread and on several that take their share of the rows; the
// outputs must be the same to the bit, and no two threads may touch the same number.
//
// Another kernel: include its file, write a function that gives its Case, and name that in CASES.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/norm.cpp"

namespace {

using Numbers = std::vector<float>;
using Kernel = std::function<void(std::vector<Numbers>& outputs, int64_t begin, int64_t end)>;

struct Case {
    const char* name;
    int64_t units;              // what is shared: rows, or blocks of rows
    std::vector<size_t> shapes; // numbers in each output
    Kernel run;
};

constexpr int THREADS = 4;
constexpr int64_t ROWS = 203, COLUMNS = 131, BLOCK_ROWS = 32;
constexpr int64_t BLOCKS = (ROWS + BLOCK_ROWS - 1) / BLOCK_ROWS;
const int64_t seed = 20170612;

const Numbers& input(int place) {
    static const std::vector<Numbers> inputs = [] {
        std::vector<Numbers> made(8, Numbers(ROWS * COLUMNS));
        uint32_t state = 1;
        for (Numbers& numbers : made)
            for (float& number : numbers)
                number = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1.0f;
        return made;
    }();
    return inputs[place];
}

tfm::Matrix matrix(const Numbers& numbers) { return {const_cast<float*>(numbers.data()), false, COLUMNS}; }

tfm::Dropout dropout() { return {&seed, 6554, 65536.0f / (65536 - 6554), 3}; }

Case norm_forward() {
    const size_t whole = ROWS * COLUMNS;
    return {"norm_forward", ROWS, {whole, whole, ROWS, ROWS}, [](auto& outputs, int64_t begin, int64_t end) {
                const tfm::NormForward call{.x = matrix(input(0)),
                                            .residual = matrix(input(1)),
                                            .y = matrix(outputs[0]),
                                            .h = matrix(outputs[1]),
                                            .x_bias = matrix(input(2)),
                                            .weight = matrix(input(3)),
                                            .bias = matrix(input(4)),
                                            .mean = outputs[2].data(),
                                            .rstd = outputs[3].data(),
                                            .columns = COLUMNS,
                                            .eps = 1e-5f,
                                            .weight_offset = 0.0f,
                                            .has_residual = true,
                                            .round_first = false,
                                            .dropout = dropout()};
                tfm::TFM_ISA::norm_forward(call, begin, end);
            }};
}

Case norm_backward() {
    const size_t whole = ROWS * COLUMNS;
    return {
        "norm_backward", BLOCKS, {whole, whole, 3 * BLOCKS * COLUMNS}, [](auto& outputs, int64_t begin, int64_t end) {
            const tfm::NormBackward call{.dy = matrix(input(0)),
                                         .dh = matrix(input(1)),
                                         .h = matrix(input(2)),
                                         .dx = matrix(outputs[0]),
                                         .dresidual = matrix(outputs[1]),
                                         .weight = matrix(input(3)),
                                         .mean = input(4).data(),
                                         .rstd = input(5).data(),
                                         .sums = outputs[2].data(),
                                         .rows = ROWS,
                                         .columns = COLUMNS,
                                         .block_rows = BLOCK_ROWS,
                                         .weight_offset = 0.0f,
                                         .dropout = dropout()};
            tfm::TFM_ISA::norm_backward(call, begin, end);
        }};
}

Case (*const CASES[])() = {norm_forward, norm_backward};

std::vector<Numbers> outputs_of(const Case& item, int threads) {
    std::vector<Numbers> outputs;
    for (const size_t count : item.shapes)
        outputs.emplace_back(count, __builtin_nanf(""));
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; ++thread)
        running.emplace_back(item.run, std::ref(outputs), item.units * thread / threads,
                             item.units * (thread + 1) / threads);
    for (std::thread& thread : running)
        thread.join();
    return outputs;
}

} // namespace

int main() {
    int failures = 0;
    for (Case (*make)() : CASES) {
        const Case item = make();
        const std::vector<Numbers> alone = outputs_of(item, 1), shared = outputs_of(item, THREADS);
        bool same = true;
        for (size_t i = 0; i < alone.size(); ++i) {
            same = same && std::memcmp(alone[i].data(), shared[i].data(), alone[i].size() * sizeof(float)) == 0;
            for (const float number : alone[i])
                same = same && number == number; // every number is written
        }
        std::printf("%s: %s\n", item.name, same ? "the same bits on 1 and 4 threads" : "DIFFERS");
        failures += !same;
    }
    return failures;
}
