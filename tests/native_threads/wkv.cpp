// fp32 with channels side by side, bf16 with steps so; both with states. The last block of channels is not whole, nor
// the last chunk of steps.
#include "cpu/wkv.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t SEQUENCES = 3, STEPS = 37, CHUNK = 8, CHUNKS = (STEPS + CHUNK - 1) / CHUNK;
constexpr int64_t WHOLE = SEQUENCES * COLUMNS * STEPS, STATE = 3 * SEQUENCES * COLUMNS, KEPT = CHUNKS * STATE;
constexpr int64_t SUMS = SEQUENCES * 2 * COLUMNS;

Sequences sequences(void* data, bool narrow) {
    return narrow ? Sequences{data, COLUMNS * STEPS, STEPS, 1} : Sequences{data, COLUMNS * STEPS, 1, COLUMNS};
}

// States whose denominators are no sums of weights would make no numbers.
const float* positive(int64_t count) {
    static std::vector<float> numbers;
    for (int64_t i = static_cast<int64_t>(numbers.size()); i < count; ++i)
        numbers.push_back(1.0f + static_cast<float>(i % 7));
    return numbers.data();
}

Wkv wkv(bool narrow) {
    return {.decay = matrix(input(0)),
            .first = matrix(input(1)),
            .key = sequences(input(2, narrow), narrow),
            .value = sequences(input(3, narrow), narrow),
            .y = {},
            .dy = sequences(input(4, narrow), narrow),
            .dkey = {},
            .dvalue = {},
            .initial = positive(KEPT),
            .dfinal = floats(6),
            .final = nullptr,
            .dinitial = nullptr,
            .kept = nullptr,
            .sums = nullptr,
            .sequences = SEQUENCES,
            .channels = COLUMNS,
            .steps = STEPS,
            .chunk = CHUNK,
            .narrow = narrow};
}

Case forward(bool narrow) {
    return {named("wkv_forward", narrow),
            SEQUENCES * channel_blocks(COLUMNS),
            {{WHOLE, narrow}, {STATE}, {KEPT}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                Wkv call = wkv(narrow);
                call.y = sequences(outputs[0].data(), narrow);
                call.final = floats(outputs[1]);
                call.kept = floats(outputs[2]);
                TFM_ISA::wkv_forward(call, begin, end);
            }};
}

Case backward(bool narrow) {
    return {named("wkv_backward", narrow),
            SEQUENCES * channel_blocks(COLUMNS),
            {{WHOLE, narrow}, {WHOLE, narrow}, {STATE}, {SUMS}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                Wkv call = wkv(narrow);
                call.dkey = sequences(outputs[0].data(), narrow);
                call.dvalue = sequences(outputs[1].data(), narrow);
                call.dinitial = floats(outputs[2]);
                call.sums = floats(outputs[3]);
                call.kept = const_cast<float*>(positive(KEPT));
                std::vector<float> scratch(scratch_rows(call) * LANES);
                TFM_ISA::wkv_backward(call, scratch.data(), begin, end);
            }};
}

} // namespace

Cases wkv_cases() { return {forward(false), forward(true), backward(false), backward(true)}; }

} // namespace tfm::threads
