#include "cpu/cross_entropy.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t IGNORED = -100;

const std::vector<int64_t>& targets() {
    static const std::vector<int64_t> made = [] {
        std::vector<int64_t> labels;
        for (int64_t row = 0; row < ROWS; ++row)
            labels.push_back(row % 13 == 0 ? IGNORED : row * 7 % COLUMNS);
        return labels;
    }();
    return made;
}

// Of bf16, whose z lies in a scratch row, without a softcap.
Case gradient(bool narrow) {
    return {named("cross_entropy", narrow),
            ROWS,
            {{ROWS * COLUMNS, narrow, input(0, narrow)}, {ROWS}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                std::vector<float> scratch(COLUMNS, __builtin_nanf(""));
                const CrossEntropy call{.logits = matrix(outputs[0].data(), narrow),
                                        .gradient = matrix(outputs[0].data(), narrow),
                                        .bias = floats(1),
                                        .target = targets().data(),
                                        .losses = floats(outputs[1]),
                                        .grad = floats(2),
                                        .divisor = floats(3),
                                        .classes = COLUMNS,
                                        .ignore_index = IGNORED,
                                        .smoothing = 0.1f,
                                        .z_loss = 1e-4f,
                                        .softcap = narrow ? 0.0f : 30.0f};
                TFM_ISA::cross_entropy(call, scratch.data(), begin, end);
            }};
}

} // namespace

Cases cross_entropy_cases() { return {gradient(false), gradient(true)}; }

} // namespace tfm::threads
