#include "cpu/norm.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t WHOLE = ROWS * COLUMNS;

Case forward(bool narrow) {
    return {named("norm_forward", narrow),
            ROWS,
            {{WHOLE, narrow}, {WHOLE, narrow}, {ROWS}, {ROWS}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const NormForward call{.x = matrix(input(0, narrow), narrow),
                                       .residual = matrix(input(1, narrow), narrow),
                                       .y = matrix(outputs[0].data(), narrow),
                                       .h = matrix(outputs[1].data(), narrow),
                                       .x_bias = floats(2),
                                       .weight = floats(3),
                                       .bias = floats(4),
                                       .mean = floats(outputs[2]),
                                       .rstd = floats(outputs[3]),
                                       .columns = COLUMNS,
                                       .eps = 1e-5f,
                                       .has_residual = true,
                                       .round_first = false,
                                       .dropout = dropout()};
                std::vector<float> scratch(4 * padded(COLUMNS));
                TFM_ISA::norm_forward(call, scratch.data(), begin, end);
            }};
}

Case backward(bool narrow) {
    return {named("norm_backward", narrow),
            BLOCKS,
            {{WHOLE, narrow}, {WHOLE, narrow}, {3 * BLOCKS * padded(COLUMNS)}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const NormBackward call{.dy = matrix(input(0, narrow), narrow),
                                        .dh = matrix(input(1, narrow), narrow),
                                        .h = matrix(input(2, narrow), narrow),
                                        .dx = matrix(outputs[0].data(), narrow),
                                        .dresidual = matrix(outputs[1].data(), narrow),
                                        .weight = floats(3),
                                        .mean = floats(4),
                                        .rstd = floats(5),
                                        .sums = floats(outputs[2]),
                                        .rows = ROWS,
                                        .columns = COLUMNS,
                                        .block_rows = BLOCK_ROWS,
                                        .dropout = dropout()};
                std::vector<float> scratch(5 * padded(COLUMNS));
                TFM_ISA::norm_backward(call, scratch.data(), begin, end);
            }};
}

} // namespace

Cases norm_cases() { return {forward(false), forward(true), backward(false), backward(true)}; }

} // namespace tfm::threads
