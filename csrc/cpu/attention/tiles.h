// Tiles of q, k, v and scores: how they come into scratch memory, as fp32 and densely, and what becomes of the products
// q·k there. Included where TFM_ISA is defined.
#pragma once

#include "cpu/attention/call.h"
#include "cpu/attention/row_products.h"
#include "cpu/dropout.h"
#include "cpu/matmul.h"

namespace tfm::TFM_ISA {

// Queries [row, row + rows) by keys [key, key + keys) of one head; rows of its scores are `stride` apart.
struct Tile {
    int64_t sequence, head, row, rows, key, keys, stride;
};

struct Span {
    int64_t begin, end;
};

// Of a row of the tile's head, counted from the tensor's first.
TFM_INLINE float& number_of(const RowNumbers& x, const Tile& tile, int64_t row) {
    return x.data[tile.sequence * x.sequence + tile.head * x.head + row * x.row];
}

// The keys that some query of [first, first + rows) sees by length and window.
TFM_INLINE Span visible_keys(const Attention& call, const Extent& extent, int64_t first, int64_t rows) {
    const int64_t begin = larger(first + extent.start - call.left, extent.key_begin);
    const int64_t end = smaller(first + rows + extent.start + call.right, extent.key_length);
    return {begin, larger(begin, end)};
}

// The queries that see some key of [first, first + keys) by the window.
TFM_INLINE Span visible_queries(const Attention& call, const Extent& extent, int64_t first, int64_t keys) {
    const int64_t begin = larger(first - call.right - extent.start, 0);
    const int64_t end = smaller(first + keys + call.left - extent.start, extent.query_length);
    return {begin, larger(begin, end)};
}

TFM_INLINE float widen_one(float value) { return value; }

TFM_INLINE float widen_one(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof(result));
    return result;
}

template <class T>
TFM_INLINE void gather_row(const T* from, int64_t step, int64_t columns, float* to) {
    if (step == 1) {
        for (int64_t column = 0; column < columns; column += WIDTH)
            store(to + column, load(from + column, columns - column));
        return;
    }
    for (int64_t column = 0; column < columns; ++column)
        to[column] = widen_one(from[column * step]);
    for (int64_t column = columns; column % WIDTH; ++column)
        to[column] = 0.0f;
}

// Of a row that begins at `place`.
TFM_INLINE void gather_row(const Heads& x, int64_t place, int64_t columns, float* to) {
    if (x.narrow)
        gather_row(static_cast<const BFloat16*>(x.data) + place, x.column, columns, to);
    else
        gather_row(static_cast<const float*>(x.data) + place, x.column, columns, to);
}

// Asks for the first rows of a head before they are read or written: neighbouring rows lie too far apart for the
// processor to guess.
TFM_INLINE void fetch(const Heads& x, int64_t sequence, int64_t head, int64_t first, int64_t rows, int64_t columns) {
    const int64_t size = x.narrow ? sizeof(BFloat16) : sizeof(float);
    const char* row = static_cast<const char*>(x.data) + (sequence * x.sequence + head * x.head + first * x.row) * size;
    // A task behind its sequence's end has less than none.
    for (int64_t left = smaller(rows, BLOCK_QUERIES); left > 0; --left, row += x.row * size)
        for (int64_t byte = 0; byte < columns * size; byte += 64)
            __builtin_prefetch(row + byte);
}

// Rows of one head to scratch memory, zeros up to whole vectors of columns and of rows, and where not reads(row).
template <class Reads>
static void gather(const Heads& x, int64_t sequence, int64_t head, int64_t first, int64_t rows, int64_t columns,
                   float* to, Reads reads) {
    const int64_t stride = padded(columns);
    const int64_t base = sequence * x.sequence + head * x.head + first * x.row;
    for (int64_t row = 0; row < (rows + WIDTH - 1) / WIDTH * WIDTH; ++row, to += stride) {
        if (row >= rows || !reads(row))
            for (int64_t column = 0; column < columns; column += WIDTH)
                store(to + column, Floats{});
        else
            gather_row(x, base + row * x.row, columns, to);
    }
}

// Rows of scratch memory times `factor` to those of one head, whose columns lie side by side.
static void scatter(const float* from, float factor, const Heads& x, int64_t sequence, int64_t head, int64_t first,
                    int64_t rows, int64_t columns) {
    const int64_t stride = padded(columns), base = sequence * x.sequence + head * x.head + first * x.row;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; column += WIDTH) {
            const Floats value = load(from + row * stride + column) * factor;
            const int64_t place = base + row * x.row + column;
            x.narrow ? store(static_cast<BFloat16*>(x.data) + place, value, columns - column)
                     : store(static_cast<float*>(x.data) + place, value, columns - column);
        }
}

TFM_INLINE const int32_t* bits_of(const Bits& bits, int64_t sequence, int64_t head, int64_t row) {
    return bits.data ? bits.data + sequence * bits.sequence + head * bits.head + row * bits.row : nullptr;
}

// Whether somebody attends to the keys from `first` on: of those in `seen`, all that have a bit.
struct Reached {
    const int32_t *words, *keys;
    int64_t first;
    Span seen;

    static __attribute__((always_inline)) bool bit(const int32_t* words, int64_t key) {
        return !words || ((words[key / 32] >> (key % 32)) & 1);
    }
    __attribute__((always_inline)) bool operator()(int64_t row) const {
        const int64_t key = first + row;
        return key >= seen.begin && key < seen.end && bit(words, key) && bit(keys, key);
    }
};

struct Always {
    __attribute__((always_inline)) bool operator()(int64_t) const { return true; }
};

TFM_INLINE Reached reached_keys(const Attention& call, int64_t sequence, int64_t head, Span seen, int64_t first = 0) {
    return {bits_of(call.reach, sequence, head, 0), bits_of(call.keys, sequence, 0, 0), first, seen};
}

// The keys or values of a tile; those out of `seen`, by length and window, are read as 0.
static void gather_keys(const Attention& call, const Heads& x, const Tile& tile, Span seen, int64_t columns,
                        float* to) {
    const Reached reached = reached_keys(call, tile.sequence, tile.head, seen, tile.key);
    gather(x, tile.sequence, tile.head / call.group, call.extents[tile.sequence].key_first + tile.key, tile.keys,
           columns, to, reached);
}

// The scores inner · q·k of a tile whose queries are few, rows in scratch memory as its keys are.
static void few_scores(const Attention& call, const Tile& tile, const float* query, const float* keys, float* scores,
                       int64_t stride) {
    const int64_t step = padded(call.dim);
    const auto place = [=](int64_t key) __attribute__((always_inline)) { return key * step; };
    for (int64_t row = 0; row < tile.rows; ++row)
        score(keys, place, tile.keys, 0, query + row * step, call.dim, call.inner, scores + row * stride);
}

// The bias by distance of keys whose distances from the query's position begin at `distance`.
TFM_INLINE Floats relative_bias(const Attention& call, int64_t head, int64_t distance) {
    const int64_t farthest = call.relative_bias.farthest, last = distance + WIDTH - 1;
    const float* const at = call.relative_bias.data + head * call.relative_bias.width() + farthest;
    if (distance >= farthest || last <= -farthest)
        return broadcast(distance >= farthest ? at[farthest] : at[-farthest]);
    if (distance >= -farthest && last <= farthest)
        return load(at + distance);
    float found[WIDTH];
    for (int64_t lane = 0; lane < WIDTH; ++lane)
        found[lane] = at[larger(smaller(distance + lane, farthest), -farthest)];
    return load(found);
}

// The scores of row `row` of the tile from inner · q·k, in place: -inf where the query may not attend. Returns the
// largest of each lane where FINDS_LARGEST says so. `slopes`: where to put the derivative of the softcap, null where
// nobody asks.
template <bool FINDS_LARGEST>
TFM_INLINE Floats finish_scores(const Attention& call, const Tile& tile, int64_t row, float* scores, float* slopes) {
    const Extent& extent = call.extents[tile.sequence];
    const int64_t query = tile.row + row, position = query + extent.start;
    const int64_t end = smaller(smaller(position + call.right + 1, extent.key_length) - tile.key, tile.keys);
    const int64_t begin = smaller(larger(position - call.left - tile.key, 0), tile.keys);
    const int32_t* const words = bits_of(call.words, tile.sequence, tile.head, query);
    const int32_t* const keys = bits_of(call.keys, tile.sequence, 0, 0);
    const Heads& bias = call.bias;
    const int64_t bias_row = tile.sequence * bias.sequence + tile.head * bias.head + query * bias.row;
    const bool are_final =
        !FINDS_LARGEST && call.outer == 0.0f && !bias.data && !call.relative_bias.data && !words && !keys;
    Floats largest = broadcast(-INFINITE);
    for (int64_t column = 0; column < tile.keys; column += WIDTH) {
        if (are_final && column >= begin && column + WIDTH <= end)
            continue;
        Floats score = load(scores + column);
        if (call.outer != 0.0f) {
            const Floats bent = tanh(score);
            score = unfused(bent * call.outer);
            if (slopes)
                store(slopes + column, 1.0f - bent * bent);
        }
        if (bias.data) {
            const int64_t place = bias_row + (tile.key + column) * bias.column;
            const int64_t count = smaller(tile.keys - column, WIDTH);
            float added[WIDTH];
            gather_row(bias, place, count, added);
            const Floats value = load(added);
            score = value == -INFINITE ? value : score + value;
        }
        if (call.relative_bias.data)
            score = score + relative_bias(call, tile.head, tile.key + column - position);
        if (words || keys) {
            const int64_t key = tile.key + column;
            const int32_t word = (words ? words[key / 32] : -1) & (keys ? keys[key / 32] : -1);
            const Ints bits = (Ints{} + (word >> (key % 32))) >> lanes();
            score = (bits & 1) != 0 ? score : broadcast(-INFINITE);
        }
        if (column < begin || column + WIDTH > end) {
            const Ints place = lanes() + static_cast<int32_t>(column);
            const Ints inside = (place >= static_cast<int32_t>(begin)) & (place < static_cast<int32_t>(larger(end, 0)));
            score = inside ? score : broadcast(-INFINITE);
        }
        store(scores + column, score);
        if (FINDS_LARGEST)
            largest = maximum(largest, score);
    }
    return largest;
}

// Dropout's outcomes for a tile; returns how many of them a row takes. Rows of few keys share a draw.
static int64_t draw_tile(const Attention& call, const Tile& tile, uint16_t* outcomes) {
    const int64_t group = tile.sequence * call.heads + tile.head, counters = (tile.keys + 7) / 8;
    int each = 1, log_each = 0; // counters a row, a power of 2
    while (each < counters && each < WIDTH)
        each *= 2, ++log_each;
    if (each == WIDTH) {
        const int64_t stride = (tile.keys + DRAWN - 1) / DRAWN * DRAWN;
        for (int64_t row = 0; row < tile.rows; ++row)
            for (int64_t key = 0; key < tile.keys; key += DRAWN)
                draw(call.dropout, tile.row + row, group, tile.key + key, outcomes + row * stride + key);
        return stride;
    }
    const Words c0 = (Words)(lanes() & (each - 1)) + static_cast<uint32_t>(tile.key / 8);
    for (int64_t row = 0; row < tile.rows; row += WIDTH / each) {
        const Words c1 = (Words)(lanes() >> log_each) + static_cast<uint32_t>(tile.row + row);
        draw(call.dropout, c0, c1, group, outcomes + row * each * 8);
    }
    return 8 * each;
}

} // namespace tfm::TFM_ISA
