#include "cpu/embedding.cpp"

#include "case.h"

namespace tfm::threads {

namespace {

constexpr int64_t TOKENS = 61, POSITIONS = 97;
constexpr int64_t SINUSOID_COLUMNS = 160; // whole vectors of pairs

// A token for each row, its position, and the rows in the order of their tokens; some tokens have none, some many.
struct Text {
    std::vector<int64_t> tokens, places, order, begins, ends;
    std::vector<uint32_t> turns;

    Text() {
        for (int64_t row = 0; row < ROWS; ++row) {
            tokens.push_back(row * row % TOKENS);
            places.push_back(row % POSITIONS);
        }
        for (int64_t token = 0; token < TOKENS; ++token) {
            begins.push_back(static_cast<int64_t>(order.size()));
            for (int64_t row = 0; row < ROWS; ++row)
                if (tokens[row] == token)
                    order.push_back(row);
            ends.push_back(static_cast<int64_t>(order.size()));
        }
        for (int64_t pair = 0; pair < SINUSOID_COLUMNS / 2; ++pair)
            turns.push_back(683565275u >> (pair / 6));
    }
};

const Text text;

Case sinusoid() {
    return {"sinusoid_rows, fp32", ROWS, {{ROWS * SINUSOID_COLUMNS}}, [](Memory& outputs, int64_t begin, int64_t end) {
                const Sinusoid call{.positions = text.places.data(),
                                    .turns = text.turns.data(),
                                    .rows = floats(outputs[0]),
                                    .columns = SINUSOID_COLUMNS};
                TFM_ISA::sinusoid_rows(call, begin, end);
            }};
}

Case forward(bool narrow) {
    return {named("embedding_forward", narrow),
            ROWS,
            {{ROWS * COLUMNS, narrow}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const EmbeddingForward call{.tokens = text.tokens.data(),
                                            .places = text.places.data(),
                                            .weight = matrix(input(0, narrow), narrow),
                                            .positions = matrix(input(1)),
                                            .y = matrix(outputs[0].data(), narrow),
                                            .columns = COLUMNS,
                                            .scale = 11.0f,
                                            .dropout = dropout()};
                TFM_ISA::embedding_forward(call, begin, end);
            }};
}

Case backward(bool narrow) {
    return {named("embedding_backward", narrow),
            TOKENS,
            {{TOKENS * COLUMNS, narrow}},
            [=](Memory& outputs, int64_t begin, int64_t end) {
                const EmbeddingBackward call{.dy = matrix(input(0, narrow), narrow),
                                             .dweight = matrix(outputs[0].data(), narrow),
                                             .order = text.order.data(),
                                             .begins = text.begins.data(),
                                             .ends = text.ends.data(),
                                             .columns = COLUMNS,
                                             .scale = 11.0f,
                                             .dropout = dropout()};
                TFM_ISA::embedding_backward(call, begin, end);
            }};
}

} // namespace

Cases embedding_cases() { return {sinusoid(), forward(false), forward(true), backward(false), backward(true)}; }

} // namespace tfm::threads
