// fp32 with channels side by side, bf16 with steps so; both with states and resets. The last block of channels is not
// whole, nor the last chunk of steps.
#include "cpu/rg_lru.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t SEQUENCES = 3, STEPS = 37, CHUNK = 8, CHUNKS = (STEPS + CHUNK - 1) / CHUNK;
constexpr int64_t STATE = SEQUENCES * COLUMNS, WHOLE = STATE * STEPS, KEPT = CHUNKS * STATE;

Sequences sequences(void* data, bool narrow) {
    return narrow ? Sequences{data, COLUMNS * STEPS, STEPS, 1} : Sequences{data, COLUMNS * STEPS, 1, COLUMNS};
}

const bool* resets() {
    static bool found[SEQUENCES * STEPS];
    for (int64_t i = 0; i < SEQUENCES * STEPS; ++i)
        found[i] = i % 11 == 3;
    return found;
}

RgLru rg_lru(bool narrow) {
    static const bool* const reset = resets();
    return {.param = matrix(input(0)),
            .x = sequences(input(1, narrow), narrow),
            .input_gate = sequences(input(2, narrow), narrow),
            .recurrence_gate = sequences(input(3, narrow), narrow),
            .y = {},
            .dy = sequences(input(4, narrow), narrow),
            .dx = {},
            .dinput_gate = {},
            .drecurrence_gate = {},
            .reset = reset,
            .reset_sequence = STEPS,
            .reset_step = 1,
            .initial = floats(5),
            .dfinal = floats(6),
            .final = nullptr,
            .dinitial = nullptr,
            .kept = nullptr,
            .sums = nullptr,
            .channels = COLUMNS,
            .steps = STEPS,
            .chunk = CHUNK,
            .narrow = narrow};
}

Case forward(bool narrow) {
    return {named("rg_lru_forward", narrow),
            SEQUENCES * channel_blocks(COLUMNS),
            {{WHOLE, narrow}, {STATE}, {KEPT}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                RgLru call = rg_lru(narrow);
                call.y = sequences(outputs[0].data(), narrow);
                call.final = floats(outputs[1]);
                call.kept = floats(outputs[2]);
                TFM_ISA::rg_lru_forward(call, begin, end);
            }};
}

Case backward(bool narrow) {
    return {named("rg_lru_backward", narrow),
            SEQUENCES * channel_blocks(COLUMNS),
            {{WHOLE, narrow}, {WHOLE, narrow}, {WHOLE, narrow}, {STATE}, {STATE}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                RgLru call = rg_lru(narrow);
                call.dx = sequences(outputs[0].data(), narrow);
                call.dinput_gate = sequences(outputs[1].data(), narrow);
                call.drecurrence_gate = sequences(outputs[2].data(), narrow);
                call.dinitial = floats(outputs[3]);
                call.sums = floats(outputs[4]);
                call.kept = floats(7);
                std::vector<float> scratch(CHUNK * LANES);
                TFM_ISA::rg_lru_backward(call, scratch.data(), begin, end);
            }};
}

} // namespace

Cases rg_lru_cases() { return {forward(false), forward(true), backward(false), backward(true)}; }

} // namespace tfm::threads
