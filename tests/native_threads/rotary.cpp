#include "cpu/rotary.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

// The last block of each sequence's tokens is not whole, nor the last vector of pairs.
constexpr int64_t SEQUENCES = 2, HEADS = 4, TOKENS = 50, DIM = 130, HALF = 33;
constexpr int64_t SEQUENCE_BLOCKS = (TOKENS + BLOCK_TOKENS - 1) / BLOCK_TOKENS;

Turned part(const void* x, void* y, int64_t heads, int64_t turned) {
    const Strides strides{TOKENS * heads * DIM, DIM, heads * DIM};
    return {x, y, strides, strides, heads, turned};
}

Table table(int place, bool narrow) { return {input(place, narrow), narrow, 0, HALF, 1}; }

void turn(const Turned& query, const Turned& key, bool narrow, int64_t begin, int64_t end) {
    const Rotary call{.parts = {query, key},
                      .cos = table(6, narrow),
                      .sin = table(7, narrow),
                      .places = nullptr,
                      .length = TOKENS,
                      .blocks = SEQUENCE_BLOCKS,
                      .half = HALF,
                      .columns = DIM,
                      .narrow = narrow,
                      .interleaved = narrow,
                      .inverse = false};
    std::vector<float> scratch(2 * BLOCK_TOKENS * padded(HALF));
    TFM_ISA::rotary(call, scratch.data(), begin, end);
}

constexpr int64_t QUERY = SEQUENCES * TOKENS * HEADS * DIM, KEY = SEQUENCES * TOKENS * DIM;

Case out_of_place(bool narrow) {
    return {named("rotary", narrow),
            SEQUENCES * SEQUENCE_BLOCKS,
            {{QUERY, narrow}, {KEY, narrow}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                turn(part(input(0, narrow), outputs[0].data(), HEADS, HEADS - 1),
                     part(input(1, narrow), outputs[1].data(), 1, 1), narrow, begin, end);
            }};
}

Case in_place(bool narrow) {
    return {named("rotary_", narrow),
            SEQUENCES * SEQUENCE_BLOCKS,
            {{QUERY, narrow, input(0, narrow)}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                uint8_t* const x = outputs[0].data();
                turn(part(x, x, HEADS, HEADS - 1), {}, narrow, begin, end);
            }};
}

} // namespace

Cases rotary_cases() { return {out_of_place(false), out_of_place(true), in_place(false), in_place(true)}; }

} // namespace tfm::threads
