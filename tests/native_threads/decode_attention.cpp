// A beam whose rows differ in length and whose keys are their ancestors', two query heads a key head, more than one
// tile of keys. The latest keys and values are outputs of their own: they are written into the cache.
#include "cpu/decode_attention/attend.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t BEAM = 12, CAPACITY = 150, KEY_HEADS = 2, GROUP = 2, DIM = 40, VALUE_DIM = 24;

struct Ancestry {
    std::vector<int32_t> lengths, parents;
    std::vector<float> wide;
    std::vector<uint16_t> narrow;

    Ancestry() {
        for (int64_t row = 0; row < BEAM; ++row) {
            lengths.push_back(static_cast<int32_t>(row == 0 ? 0 : CAPACITY - row % 3));
            // Before the place that the shortest row is about to write.
            for (int64_t place = 0; place < CAPACITY; ++place)
                parents.push_back(static_cast<int32_t>(place < CAPACITY - 3 ? (row * 5 + place) % BEAM : row));
        }
        // What a cache holds before: numbers from -1 to 1.
        for (int64_t i = 0; i < BEAM * CAPACITY * KEY_HEADS * DIM; ++i) {
            wide.push_back(floats(3)[i % (2 * ROWS * COLUMNS)]);
            narrow.push_back(static_cast<uint16_t*>(input(3, true))[i % (2 * ROWS * COLUMNS)]);
        }
    }
};

const Ancestry& ancestry() {
    static const Ancestry made;
    return made;
}

HeadRows rows(void* data, int64_t count, int64_t columns) { return {data, count * columns, 0, columns}; }

HeadRows cache(void* data, int64_t columns) {
    return {data, CAPACITY * KEY_HEADS * columns, KEY_HEADS * columns, columns};
}

Case decode(bool narrow) {
    const void* const held = narrow ? static_cast<const void*>(ancestry().narrow.data()) : ancestry().wide.data();
    return {named("decode_attention", narrow),
            BEAM * KEY_HEADS,
            {{BEAM * KEY_HEADS * GROUP * VALUE_DIM, narrow},
             {BEAM * CAPACITY * KEY_HEADS * DIM, narrow, held},
             {BEAM * CAPACITY * KEY_HEADS * VALUE_DIM, narrow, held}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const DecodeAttention call{.query = rows(input(0, narrow), KEY_HEADS * GROUP, DIM),
                                           .key = rows(input(1, narrow), KEY_HEADS, DIM),
                                           .value = rows(input(2, narrow), KEY_HEADS, VALUE_DIM),
                                           .key_cache = cache(outputs[1].data(), DIM),
                                           .value_cache = cache(outputs[2].data(), VALUE_DIM),
                                           .output = rows(outputs[0].data(), KEY_HEADS * GROUP, VALUE_DIM),
                                           .narrow = narrow,
                                           .lengths = ancestry().lengths.data(),
                                           .parents = ancestry().parents.data(),
                                           .length_stride = 1,
                                           .parents_row = CAPACITY,
                                           .parents_place = 1,
                                           .key_heads = KEY_HEADS,
                                           .group = GROUP,
                                           .dim = DIM,
                                           .value_dim = VALUE_DIM,
                                           .capacity = CAPACITY,
                                           .longest = CAPACITY,
                                           .scale = 0.158f};
                std::vector<float> scratch(DecodeScratch{call}.floats);
                TFM_ISA::decode_attention(call, begin, end, scratch.data());
            }};
}

} // namespace

Cases decode_attention_cases() { return {decode(false), decode(true)}; }

} // namespace tfm::threads
