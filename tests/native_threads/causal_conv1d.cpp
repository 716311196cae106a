// fp32 with channels side by side, bf16 with steps so; both with states. The last block of channels is not whole, nor
// the last steps that are added up together.
#include "cpu/causal_conv1d.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t SEQUENCES = 3, STEPS = 37, TAPS = 4, STATE = TAPS - 1;
constexpr int64_t WHOLE = SEQUENCES * COLUMNS * STEPS, STATES = SEQUENCES * COLUMNS * STATE;
constexpr int64_t PADDED = (COLUMNS + LANES - 1) / LANES * LANES, SUMS = (TAPS + 1) * PADDED;

Sequences sequences(void* data, bool narrow, int64_t steps) {
    return narrow ? Sequences{data, COLUMNS * steps, steps, 1} : Sequences{data, COLUMNS * steps, 1, COLUMNS};
}

Convolution convolution(bool narrow) {
    return {.x = sequences(input(0, narrow), narrow, STEPS),
            .y = {},
            .dy = sequences(input(1, narrow), narrow, STEPS),
            .dx = {},
            .initial = sequences(input(2, narrow), narrow, STATE),
            .final = {},
            .dinitial = {},
            .dfinal = sequences(input(3, narrow), narrow, STATE),
            .taps = floats(4),
            .bias = floats(5),
            .sums = nullptr,
            .sequences = SEQUENCES,
            .channels = COLUMNS,
            .steps = STEPS,
            .width = TAPS,
            .narrow = narrow,
            .silu = true};
}

Case forward(bool narrow) {
    return {named("convolve", narrow),
            SEQUENCES * channel_blocks(COLUMNS),
            {{WHOLE, narrow}, {STATES, narrow}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                Convolution call = convolution(narrow);
                call.y = sequences(outputs[0].data(), narrow, STEPS);
                call.final = sequences(outputs[1].data(), narrow, STATE);
                std::vector<float> scratch(scratch_rows(call) * LANES);
                TFM_ISA::convolve(call, scratch.data(), begin, end);
            }};
}

Case backward(bool narrow) {
    static const float zeros[SUMS] = {};
    return {named("convolve_backward", narrow),
            channel_blocks(COLUMNS),
            {{WHOLE, narrow}, {STATES, narrow}, {SUMS, false, zeros}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                Convolution call = convolution(narrow);
                call.dx = sequences(outputs[0].data(), narrow, STEPS);
                call.dinitial = sequences(outputs[1].data(), narrow, STATE);
                call.sums = floats(outputs[2]);
                std::vector<float> scratch(scratch_rows(call) * LANES);
                TFM_ISA::convolve_backward(call, scratch.data(), begin, end);
            }};
}

} // namespace

Cases causal_conv1d_cases() { return {forward(false), forward(true), backward(false), backward(true)}; }

} // namespace tfm::threads
