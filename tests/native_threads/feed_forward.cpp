#include "cpu/feed_forward.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

// GELU of fp32 in place, or of bf16 SiLU with a gate, which has twice the columns.
constexpr Activation activation(bool gated) { return gated ? Activation::SILU : Activation::GELU; }

Case forward(bool gated) {
    const bool narrow = gated;
    const int64_t width = gated ? 2 * COLUMNS : COLUMNS;
    return {named(gated ? "hidden_forward, gated" : "hidden_forward", narrow),
            ROWS,
            {{ROWS * COLUMNS, narrow}, {ROWS * width, narrow, input(0, narrow)}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const HiddenForward call{.product = matrix(outputs[1].data(), narrow, width),
                                         .hidden = matrix(outputs[0].data(), narrow),
                                         .bias = gated ? nullptr : floats(1),
                                         .columns = COLUMNS,
                                         .activation = activation(gated),
                                         .gated = gated,
                                         .keep = true,
                                         .dropout = dropout()};
                TFM_ISA::hidden_forward(call, begin, end);
            }};
}

// ReLU where nothing is kept: hidden takes the place of the product.
Case forward_in_place() {
    return {"hidden_forward, relu in place, fp32",
            ROWS,
            {{ROWS * COLUMNS, false, input(0)}},
            [](Memory& outputs, int64_t begin, int64_t end) {
                const HiddenForward call{.product = matrix(outputs[0].data()),
                                         .hidden = matrix(outputs[0].data()),
                                         .bias = floats(1),
                                         .columns = COLUMNS,
                                         .activation = Activation::RELU,
                                         .gated = false,
                                         .keep = false,
                                         .dropout = dropout()};
                TFM_ISA::hidden_forward(call, begin, end);
            }};
}

Case backward(bool gated) {
    const bool narrow = gated;
    const int64_t width = gated ? 2 * COLUMNS : COLUMNS;
    void *const given = input(0, narrow), *const saved = input(1, narrow);
    return {named(gated ? "hidden_backward, gated" : "hidden_backward", narrow),
            BLOCKS,
            {{ROWS * width, narrow, gated ? nullptr : given}, {ROWS * COLUMNS, narrow}, {BLOCKS * COLUMNS}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const HiddenBackward call{.dhidden = matrix(gated ? given : outputs[0].data(), narrow),
                                          .saved = matrix(saved, narrow, width),
                                          .dpre = matrix(outputs[0].data(), narrow, width),
                                          .hidden = matrix(outputs[1].data(), narrow),
                                          .sums = floats(outputs[2]),
                                          .rows = ROWS,
                                          .columns = COLUMNS,
                                          .block_rows = BLOCK_ROWS,
                                          .activation = activation(gated),
                                          .gated = gated,
                                          .dropout = dropout()};
                TFM_ISA::hidden_backward(call, begin, end);
            }};
}

} // namespace

Cases feed_forward_cases() {
    return {forward(false), forward(true), forward_in_place(), backward(false), backward(true)};
}

} // namespace tfm::threads
