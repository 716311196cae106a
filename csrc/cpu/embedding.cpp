// Token rows, scaled, with positions and dropout: the formulas of kernels/embedding.py.
//
// Forward: the sinusoid's rows are computed once a call, for the positions up to the furthest one, so that they are a
// table as a learned one is; only positions that are spread wider than there are tokens get a row each. Then one pass
// over the tokens reads a row of either table and writes theirs.
// Backward: a counting sort brings each token's places together in their order. Every row of the gradient is then
// written once by one thread, the sum of its places' or 0, so that nothing is filled before nor added to atomically,
// and the bits are the same on any number of threads.
#include "cpu/isa.h"

#include "common/philox.h"
#include "cpu/matrix.h"

namespace tfm {

struct Sinusoid {
    const int64_t* positions; // of each row; null: its own number
    const uint32_t* turns;    // of each pair of columns: its frequency as a fraction of a turn, 2^32 being one
    float* rows;
    int64_t columns; // whole vectors of pairs
};

struct EmbeddingForward {
    const int64_t* tokens;
    const int64_t* places; // the row of `positions` for each token
    Matrix weight, positions, y;
    int64_t columns;
    float scale;
    Dropout dropout;
};

struct EmbeddingBackward {
    Matrix dy, dweight;
    const int64_t* order;  // the tokens' rows of dy, sorted by token
    const int64_t* begins; // where in that order the sum for each row of dweight begins and ends
    const int64_t* ends;
    int64_t columns;
    float scale; // of tokens and of dropout
    Dropout dropout;
};

TFM_KERNEL(sinusoid_rows, const Sinusoid& call, int64_t first_row, int64_t last_row)
TFM_KERNEL(embedding_forward, const EmbeddingForward& call, int64_t first_row, int64_t last_row)
TFM_KERNEL(embedding_backward, const EmbeddingBackward& call, int64_t first_row, int64_t last_row)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/dropout.h"

namespace tfm::TFM_ISA {

// position · frequency wraps around as whole turns do; polynomials give what the last eighth of a turn leaves.
void sinusoid_rows(const Sinusoid& call, int64_t first_row, int64_t last_row) {
    for (int64_t row = first_row; row < last_row; ++row) {
        const uint32_t position = static_cast<uint32_t>(call.positions ? call.positions[row] : row);
        float* to = call.rows + row * call.columns;
        for (int64_t pair = 0; pair < call.columns / 2; pair += WIDTH, to += 2 * WIDTH) {
            Words angle;
            __builtin_memcpy(&angle, call.turns + pair, sizeof(angle));
            angle *= position;
            const Words quarter = (angle + 0x20000000u) >> 30;
            const Floats x = __builtin_convertvector((Ints)(angle - (quarter << 30)), Floats) * 1.4629180792671596e-09f;
            const Floats square = x * x;
            // Moshier's polynomials (Cephes, sinf.c), within 1.2 roundings up to an eighth of a turn.
            const Floats sine =
                x + x * square * (-1.6666654611e-1f + square * (8.3321608736e-3f - square * 1.9515295891e-4f));
            Floats cosine = -1.388731625493765e-3f + square * 2.443315711809948e-5f;
            cosine = 1.0f - 0.5f * square + square * square * (4.166664568298827e-2f + square * cosine);
            const Ints swapped = (quarter & 1) != 0;
            const Words sines = (Words)(swapped ? cosine : sine) ^ ((quarter & 2) << 30);
            const Words cosines = (Words)(swapped ? sine : cosine) ^ (((quarter + 1) & 2) << 30);
            Words first, second;
            zip(sines, cosines, first, second);
            store(to, (Floats)first);
            store(to + WIDTH, (Floats)second);
        }
    }
}

void embedding_forward(const EmbeddingForward& given, int64_t first_row, int64_t last_row) {
    const EmbeddingForward call = given; // a copy, which what is stored cannot change
    uint16_t outcomes[DRAWN];
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t token = call.tokens[row] * call.weight.stride, place = call.places[row] * call.positions.stride;
        for (int64_t column = 0; column < call.columns; column += WIDTH) {
            const int64_t count = call.columns - column;
            Floats value = get(call.weight, token + column, count) * call.scale;
            value += get(call.positions, place + column, count);
            value = drop_next(call.dropout, row, column, outcomes, value);
            set(call.y, row * call.y.stride + column, value, count);
        }
    }
}

void embedding_backward(const EmbeddingBackward& given, int64_t first_row, int64_t last_row) {
    const EmbeddingBackward call = given;
    uint16_t outcomes[DRAWN];
    for (int64_t row = first_row; row < last_row; ++row) {
        // As many columns at a time as are drawn at once: their sums stay in registers.
        for (int64_t column = 0; column < call.columns; column += DRAWN) {
            Floats sums[8] = {};
            for (int64_t i = call.begins[row]; i < call.ends[row]; ++i) {
                const int64_t from = call.order[i], left = call.columns - column;
                if (call.dropout.seed)
                    draw(call.dropout, from, 0, column, outcomes);
                for (int part = 0; part < 8 && part * WIDTH < left; ++part) {
                    const int64_t offset = part * WIDTH;
                    const Floats value = get(call.dy, from * call.dy.stride + column + offset, left - offset);
                    sums[part] += call.dropout.seed ? kept(call.dropout, outcomes + offset) ? value : Floats{} : value;
                }
            }
            for (int64_t offset = 0; offset < DRAWN && column + offset < call.columns; offset += WIDTH)
                set(call.dweight, row * call.dweight.stride + column + offset, sums[offset / WIDTH] * call.scale,
                    call.columns - column - offset);
        }
    }
}

} // namespace tfm::TFM_ISA

#else

#include <numbers>

#include "cpu/integers.h"
#include "cpu/rows.h"
#include "operators/embedding.h"

namespace tfm {

namespace {

// The sinusoid's rows for these positions, which become the rows' numbers.
Tensor sinusoid(Numbers& positions, int64_t columns, const Tensor& like) {
    const auto [least, most] = std::minmax_element(positions.begin(), positions.end());
    const int64_t count = static_cast<int64_t>(positions.size());
    const bool by_position = count > 0 && *least >= 0 && *most < count;
    const int64_t rows = by_position ? *most + 1 : count;
    constexpr int64_t WHOLE = 32; // columns of the widest vector of pairs
    const int64_t width = (columns + WHOLE - 1) / WHOLE * WHOLE;
    std::vector<uint32_t> turns(width / 2);
    for (int64_t pair = 0; pair < (columns + 1) / 2; ++pair) {
        const double radians = std::exp(-2 * std::log(10000.0) * static_cast<double>(pair) / columns);
        turns[pair] = static_cast<uint32_t>(std::llround(radians * (4294967296.0 / (2 * std::numbers::pi))));
    }
    Tensor table = empty({rows, width}, ScalarType::Float, like);
    const Sinusoid call{
        .positions = by_position ? nullptr : positions.data(),
        .turns = turns.data(),
        .rows = static_cast<float*>(table.data_ptr()),
        .columns = width,
    };
    for_rows(rows, width, [&](int64_t begin, int64_t end) { TFM_RUN(sinusoid_rows, call, begin, end); });
    if (!by_position)
        for (int64_t row = 0; row < count; ++row)
            positions[row] = row;
    return table;
}

Tensor embedding(const arguments::Embedding& a) {
    std::vector<int64_t> shape = shape_of(a.tokens);
    const Numbers token_rows = numbers_of(a.tokens, shape);
    Numbers places = numbers_of(a.positions, shape);
    const int64_t columns = a.weight.size(1);
    shape.push_back(columns);
    Tensor y = empty(shape, a.weight.scalar_type(), a.weight);
    check_inside("tokens", token_rows, a.weight.size(0));
    if (a.position_weight)
        check_inside("positions", places, a.position_weight->size(0));
    const Rows weight_rows(a.weight);
    const Rows position_rows(a.position_weight ? *a.position_weight : sinusoid(places, columns, a.weight));
    const EmbeddingForward call{
        .tokens = token_rows.data(),
        .places = places.data(),
        .weight = matrix(weight_rows),
        .positions = matrix(position_rows),
        .y = {y.data_ptr(), weight_rows.width() == Width::BFLOAT16, columns},
        .columns = columns,
        .scale = static_cast<float>(a.scale),
        .dropout = dropout_of(a.seed, a.dropout_p, a.site),
    };
    for_rows(token_rows.size(), columns,
             [&](int64_t begin, int64_t end) { TFM_RUN(embedding_forward, call, begin, end); });
    return y;
}

// Ranges of rows with like amounts of work, which a row's own zeros and each place that it sums are.
Numbers share_work(const Numbers& begins, const Numbers& ends, int64_t rows, int64_t places) {
    constexpr int64_t RANGES = 64, PLACE = 4;
    const int64_t each = (rows + PLACE * places) / RANGES + 1;
    Numbers bounds{0};
    int64_t work = 0;
    for (int64_t row = 0; row < rows; ++row) {
        work += 1 + PLACE * (ends[row] - begins[row]);
        if (work >= each) {
            bounds.push_back(row + 1);
            work = 0;
        }
    }
    bounds.push_back(rows);
    return bounds;
}

std::tuple<Tensor, MaybeTensor> embedding_backward(const arguments::EmbeddingBackward& a) {
    const Numbers token_rows = numbers_of(a.tokens, shape_of(a.tokens));
    check_inside("tokens", token_rows, a.rows);
    const int64_t count = static_cast<int64_t>(token_rows.size()), columns = a.dy.size(a.dy.dim() - 1);
    const int64_t asked = a.padding_idx.value_or(-1 - a.rows), padding = asked < 0 ? asked + a.rows : asked; // -1: none

    // Padding is not counted, and so not summed.
    Numbers begins(a.rows + 1), order(count);
    for (const int64_t token : token_rows)
        begins[token + 1] += token != padding;
    for (int64_t row = 0; row < a.rows; ++row)
        begins[row + 1] += begins[row];
    Numbers next(begins.begin(), begins.end() - 1);
    for (int64_t place = 0; place < count; ++place)
        if (token_rows[place] != padding)
            order[next[token_rows[place]]++] = place;
    Numbers& ends = next; // where the last of each token's places went

    MaybeTensor indices;
    int64_t size = a.rows;
    if (a.sparse) {
        // One row for each token: the whole sum for the first of those that are the same, zeros for the others.
        indices = empty({1, count}, ScalarType::Long, a.dy);
        int64_t* const index = data_of<int64_t>(indices);
        Numbers first(count), last(count);
        for (int64_t place = 0; place < count; ++place)
            index[place] = place % a.rows;
        for (int64_t row = 0; row < a.rows; ++row)
            if (ends[row] > begins[row]) {
                index[begins[row]] = row;
                first[begins[row]] = begins[row];
                last[begins[row]] = ends[row];
            }
        begins = std::move(first);
        ends = std::move(last);
        size = count;
    }
    Tensor gradient = empty({size, columns}, a.dtype, a.dy);
    const Rows dy_rows(a.dy);
    const Dropout dropout = dropout_of(a.seed, a.dropout_p, a.site);
    const EmbeddingBackward call{
        .dy = matrix(dy_rows),
        .dweight = {gradient.data_ptr(), width_of(a.dtype) == Width::BFLOAT16, columns},
        .order = order.data(),
        .begins = begins.data(),
        .ends = ends.data(),
        .columns = columns,
        .scale = static_cast<float>(a.seed ? a.scale * dropout.scale : a.scale),
        .dropout = dropout,
    };
    const Numbers bounds = share_work(begins, ends, size, count);
    const int64_t ranges = static_cast<int64_t>(bounds.size()) - 1;
    for_rows(ranges, (size + count) * columns / ranges,
             [&](int64_t begin, int64_t end) { TFM_RUN(embedding_backward, call, bounds[begin], bounds[end]); });
    return {gradient, indices};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::Embedding, embedding>(m);
    implement<arguments::EmbeddingBackward, embedding_backward>(m);
}

} // namespace tfm

#endif
