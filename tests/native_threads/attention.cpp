// fp32 with everything: a bias of each score and one by distance, sinks, a softcap, a window that leaves queries of the
// second sequence without keys. bf16: causal, and a mask, whose bits are a case of their own. Both have dropout, two
// query heads a key head, and more than one tile each way.
#include "cpu/attention/backward.cpp"
#include "cpu/attention/forward.cpp"
#include "cpu/attention/mask_bits.cpp"
#include "cpu/attention/weights.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t SEQUENCES = 2, HEADS = 4, GROUP = 2, LENGTH = 150, DIM = 40, VALUE_DIM = 24;
constexpr int64_t KEY_HEADS = HEADS / GROUP, STATISTICS = SEQUENCES * HEADS * LENGTH;
constexpr int64_t WORDS = 8; // of a row of the mask
constexpr int64_t FARTHEST = 20;
const Extent EXTENTS[SEQUENCES] = {{0, LENGTH, 0, 140, LENGTH, 0}, {0, LENGTH, 0, 61, LENGTH, 0}};

Heads heads(void* data, bool narrow, int64_t count, int64_t columns) {
    return {data, narrow, count * LENGTH * columns, LENGTH * columns, columns, 1};
}

int32_t* integers(std::vector<uint8_t>& output) { return reinterpret_cast<int32_t*>(output.data()); }

RowNumbers row_numbers(float* data) { return {data, HEADS * LENGTH, LENGTH, 1}; }
RowStatistics statistics(float* data) { return {row_numbers(data), row_numbers(data + STATISTICS)}; }

// Each fifth key is seen by nobody: no word is all ones, which as a float would be no number.
Case mask_bits() {
    static const int64_t starts[SEQUENCES] = {};
    std::vector<uint8_t> mask;
    for (int64_t query = 0; query < LENGTH; ++query)
        for (int64_t key = 0; key < LENGTH; ++key)
            mask.push_back(key % 5 != 0 && (query + key) % 3 != 0);
    return {"attention_mask_bits",
            SEQUENCES * HEADS,
            {{STATISTICS * WORDS}, {SEQUENCES * HEADS * WORDS}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const MaskBits call{.mask = mask.data(),
                                    .type = MaskType::BOOL,
                                    .sequence = 0,
                                    .head = 0,
                                    .row = LENGTH,
                                    .column = 1,
                                    .words = integers(outputs[0]),
                                    .reach = integers(outputs[1]),
                                    .starts = starts,
                                    .word_sequences = SEQUENCES,
                                    .heads = HEADS,
                                    .queries = LENGTH,
                                    .keys = LENGTH,
                                    .width = WORDS,
                                    .left = OPEN,
                                    .right = 0};
                TFM_ISA::mask_bits(call, begin, end);
            }};
}

// What one kernel gives, for the next to take.
Memory results_of(const Case& item) {
    Memory outputs;
    for (const Output& output : item.outputs)
        outputs.emplace_back(output.bytes());
    item.run(outputs, 0, item.units);
    return outputs;
}

Memory& mask() {
    static Memory bits = results_of(mask_bits());
    return bits;
}

Bits words() { return {integers(mask()[0]), HEADS * LENGTH * WORDS, LENGTH * WORDS, WORDS}; }
Bits reach() { return {integers(mask()[1]), HEADS * WORDS, WORDS, 0}; }

Attention attention(bool narrow) {
    const float scale = 0.158f, softcap = 5.0f;
    return {.query = heads(input(0, narrow), narrow, HEADS, DIM),
            .key = heads(input(1, narrow), narrow, KEY_HEADS, DIM),
            .value = heads(input(2, narrow), narrow, KEY_HEADS, VALUE_DIM),
            .bias = narrow ? Heads{} : Heads{input(3), false, 0, 0, LENGTH, 1},
            .relative_bias = {narrow ? nullptr : floats(7), FARTHEST},
            .words = narrow ? words() : Bits{},
            .reach = narrow ? reach() : Bits{},
            .extra_scores = narrow ? Matrix{} : matrix(floats(4)),
            .extra_gradients = nullptr,
            .extents = EXTENTS,
            .heads = HEADS,
            .group = GROUP,
            .dim = DIM,
            .value_dim = VALUE_DIM,
            .longest_query = LENGTH,
            .longest_key = LENGTH,
            .left = narrow ? OPEN : 40,
            .right = 0,
            .inner = narrow ? scale : scale / softcap,
            .outer = narrow ? 0.0f : softcap,
            .scale = scale,
            .dropout = dropout()};
}

std::vector<Task> tasks(int64_t sequences, int64_t head_count, int64_t queries, int64_t keys) {
    std::vector<Task> made;
    for (int64_t sequence = 0; sequence < sequences; ++sequence)
        for (int64_t head = 0; head < head_count; ++head)
            for (int64_t query = 0; query < queries; query += BLOCK_QUERIES)
                for (int64_t key = 0; key < keys; key += BLOCK_KEYS)
                    made.push_back({sequence, head, query, key});
    return made;
}

std::vector<float> scratch(int64_t size) { return std::vector<float>(size, __builtin_nanf("")); }

Case forward(bool narrow) {
    const std::vector<Task> all = tasks(SEQUENCES, HEADS, LENGTH, 1);
    return {named("attention_forward", narrow),
            static_cast<int64_t>(all.size()),
            {{STATISTICS * VALUE_DIM, narrow}, {2 * STATISTICS}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const AttentionForward call{.attention = attention(narrow),
                                            .output = heads(outputs[0].data(), narrow, HEADS, VALUE_DIM),
                                            .statistics = statistics(floats(outputs[1]))};
                std::vector<float> memory = scratch(ForwardScratch{call.attention}.floats);
                TFM_ISA::attention_forward(call, all.data(), begin, end, memory.data());
            }};
}

// Of the forward's one run: its output and statistics.
Memory& forward_of(bool narrow) {
    static Memory wide = results_of(forward(false)), half = results_of(forward(true));
    return narrow ? half : wide;
}

Cotangents cotangents(bool narrow) {
    Memory& results = forward_of(narrow);
    return {heads(input(5, narrow), narrow, HEADS, VALUE_DIM), heads(results[0].data(), narrow, HEADS, VALUE_DIM),
            statistics(floats(results[1])), row_numbers(floats(6))};
}

Case backward(bool narrow) {
    const int64_t keys = SEQUENCES * KEY_HEADS * LENGTH;
    const std::vector<Task> all = tasks(SEQUENCES, KEY_HEADS, 1, 1);
    std::vector<Output> wanted = {{STATISTICS * DIM, narrow}, {keys * DIM, narrow}, {keys * VALUE_DIM, narrow}};
    if (!narrow) {
        wanted.push_back({SEQUENCES * HEADS});
        wanted.push_back({SEQUENCES * KEY_HEADS * LENGTH * padded(LENGTH)});
        wanted.push_back({SEQUENCES * HEADS * (2 * FARTHEST + 1)});
    }
    return {named("attention_backward", narrow), static_cast<int64_t>(all.size()), wanted,
            [=](Memory& outputs, int64_t begin, int64_t end) {
                AttentionBackward call{.attention = attention(narrow),
                                       .given = cotangents(narrow),
                                       .dq = heads(outputs[0].data(), narrow, HEADS, DIM),
                                       .dk = heads(outputs[1].data(), narrow, KEY_HEADS, DIM),
                                       .dv = heads(outputs[2].data(), narrow, KEY_HEADS, VALUE_DIM),
                                       .sums = {.dense = narrow ? nullptr : floats(outputs[4]),
                                                .relative = narrow ? nullptr : floats(outputs[5]),
                                                .each = 1,
                                                .rows = LENGTH,
                                                .row = padded(LENGTH),
                                                .shares_heads = true}};
                call.attention.extra_gradients = narrow ? nullptr : floats(outputs[3]);
                std::vector<float> memory = scratch(BackwardScratch{call.attention}.floats);
                TFM_ISA::attention_backward(call, all.data(), begin, end, memory.data());
            }};
}

Case weights() {
    const std::vector<Task> all = tasks(SEQUENCES, HEADS, LENGTH, LENGTH);
    return {"attention_weights, fp32",
            static_cast<int64_t>(all.size()),
            {{STATISTICS * LENGTH}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const AttentionWeights call{.attention = attention(false),
                                            .statistics = statistics(floats(forward_of(false)[1])),
                                            .weights = heads(outputs[0].data(), false, HEADS, LENGTH),
                                            .keys = LENGTH};
                std::vector<float> memory = scratch(WeightsScratch{call.attention}.floats);
                TFM_ISA::attention_weights(call, all.data(), begin, end, memory.data());
            }};
}

} // namespace

Cases attention_cases() {
    return {mask_bits(), forward(false), forward(true), backward(false), backward(true), weights()};
}

} // namespace tfm::threads
