// fp32 with channels side by side, bf16 with steps so; both with states, a gate and all parameters. The last group of
// channels is not whole, nor the last chunk of steps.
#include "cpu/selective_scan.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t SEQUENCES = 3, STEPS = 37, CHUNK = 16, CHUNKS = (STEPS + CHUNK - 1) / CHUNK, STATES = 5;
constexpr int64_t WHOLE = SEQUENCES * COLUMNS * STEPS, STATE = SEQUENCES * COLUMNS * STATES, KEPT = CHUNKS * STATE;
constexpr int64_t GROUPS = (COLUMNS + GROUP - 1) / GROUP, GIVEN = SEQUENCES * STEPS * STATES;

Sequences sequences(void* data, bool narrow) {
    return narrow ? Sequences{data, COLUMNS * STEPS, STEPS, 1} : Sequences{data, COLUMNS * STEPS, 1, COLUMNS};
}

Sequences given(void* data) { return {data, STEPS * STATES, 1, STATES}; }

SelectiveScan scan(bool narrow) {
    SelectiveScan call{};
    call.rate = matrix(input(0));
    call.skip = matrix(input(1));
    call.bias = matrix(input(2));
    call.x = sequences(input(1, narrow), narrow);
    call.delta = sequences(input(2, narrow), narrow);
    call.gate = sequences(input(3, narrow), narrow);
    call.enters = given(input(4, narrow));
    call.seen = given(input(5, narrow));
    call.dy = sequences(input(6, narrow), narrow);
    call.initial = floats(5);
    call.dfinal = floats(6);
    call.sequences = SEQUENCES;
    call.channels = COLUMNS;
    call.states = STATES;
    call.steps = STEPS;
    call.chunk = CHUNK;
    call.narrow = narrow;
    return call;
}

Case forward(bool narrow) {
    return {named("selective_scan_forward", narrow),
            SEQUENCES * GROUPS,
            {{WHOLE, narrow}, {STATE}, {KEPT}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                SelectiveScan call = scan(narrow);
                call.y = sequences(outputs[0].data(), narrow);
                call.final = floats(outputs[1]);
                call.kept = floats(outputs[2]);
                std::vector<float> scratch(forward_scratch(call));
                TFM_ISA::selective_scan_forward(call, scratch.data(), begin, end);
            }};
}

Case backward(bool narrow) {
    return {named("selective_scan_backward", narrow),
            SEQUENCES * GROUPS,
            {{WHOLE, narrow},
             {WHOLE, narrow},
             {WHOLE, narrow},
             {STATE},
             {SEQUENCES * (STATES + 2) * COLUMNS},
             {GROUPS * 2 * GIVEN}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                SelectiveScan call = scan(narrow);
                call.dx = sequences(outputs[0].data(), narrow);
                call.ddelta = sequences(outputs[1].data(), narrow);
                call.dgate = sequences(outputs[2].data(), narrow);
                call.dinitial = floats(outputs[3]);
                call.sums = floats(outputs[4]);
                call.shared = floats(outputs[5]);
                call.kept = floats(7);
                std::vector<float> scratch(backward_scratch(call));
                TFM_ISA::selective_scan_backward(call, scratch.data(), begin, end);
            }};
}

Case sum(bool narrow) {
    return {named("selective_scan_sum", narrow),
            SEQUENCES * STEPS,
            {{GIVEN, narrow}, {GIVEN, narrow}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                SelectiveScan call = scan(narrow);
                call.denters = given(outputs[0].data());
                call.dseen = given(outputs[1].data());
                call.shared = floats(3);
                TFM_ISA::selective_scan_sum(call, begin, end);
            }};
}

} // namespace

Cases selective_scan_cases() {
    return {forward(false), forward(true), backward(false), backward(true), sum(false), sum(true)};
}

} // namespace tfm::threads
