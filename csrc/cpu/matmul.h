// Products of small fp32 matrices that lie in the cache: a block of the result stays in registers while the depth goes
// by. Included where TFM_ISA is defined.
//
//     C [rows, columns] = A [rows, depth] B [depth, columns], or C += A B
//
// Each step of the depth loads two vectors of a row of B and multiplies them by ROWS numbers of A: 16 multiply-adds for
// 10 loads with AVX-512, 12 for 8 with AVX2, in as many chains as hide their latency. A may be given transposed.
#pragma once

#include "cpu/vector.h"

namespace tfm::TFM_ISA {

// Rows of C in registers at once, by two vectors: AVX2 has 16 registers, the others 32.
constexpr int BLOCK_ROWS = WIDTH == 8 ? 6 : 8;
// Columns of B that are read together.
constexpr int PAIR = 2 * WIDTH;

// A sum of more numbers is the sum of two halves: its rounding would grow with its length.
constexpr int64_t LONGEST_SUM = 64;

// Where the columns [i * PAIR, (i + 1) * PAIR) of B's rows lie: at data + i * pair, the rows `row` apart. A matrix has
// pair = PAIR; in panels, each of depth x PAIR numbers, row = PAIR and pair = depth * PAIR.
struct Columns {
    const float* data;
    int64_t row, pair;
};

template <bool TRANSPOSED, bool ADD, int VECTORS, int ROWS>
static void product_block(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_row, float* c,
                          int64_t c_row) {
    Floats sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int i = 0; i < VECTORS; ++i)
            sums[row][i] = Floats{};
    for (int64_t k = 0; k < depth; ++k, b += b_row) {
        Floats columns[VECTORS];
#pragma GCC unroll 2
        for (int i = 0; i < VECTORS; ++i)
            columns[i] = load(b + i * WIDTH);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            const Floats factor = broadcast(TRANSPOSED ? a[k * a_stride + row] : a[row * a_stride + k]);
#pragma GCC unroll 2
            for (int i = 0; i < VECTORS; ++i)
                sums[row][i] += factor * columns[i];
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int i = 0; i < VECTORS; ++i)
            store(c + row * c_row + i * WIDTH, ADD ? load(c + row * c_row + i * WIDTH) + sums[row][i] : sums[row][i]);
}

// The rows that no whole block covers, fewer than ROWS.
template <bool TRANSPOSED, bool ADD, int VECTORS, int ROWS = BLOCK_ROWS>
static void product_rest(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_row,
                         float* c, int64_t c_row) {
    if constexpr (ROWS > 1) {
        if (rows == ROWS - 1)
            product_block<TRANSPOSED, ADD, VECTORS, ROWS - 1>(depth, a, a_stride, b, b_row, c, c_row);
        else
            product_rest<TRANSPOSED, ADD, VECTORS, ROWS - 1>(rows, depth, a, a_stride, b, b_row, c, c_row);
    }
}

template <bool TRANSPOSED, bool ADD, int VECTORS>
static void product_columns(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const float* b,
                            int64_t b_row, float* c, int64_t c_row) {
    const int64_t step = TRANSPOSED ? 1 : a_stride;
    int64_t row = 0;
    for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS)
        product_block<TRANSPOSED, ADD, VECTORS, BLOCK_ROWS>(depth, a + row * step, a_stride, b, b_row, c + row * c_row,
                                                            c_row);
    product_rest<TRANSPOSED, ADD, VECTORS>(rows - row, depth, a + row * step, a_stride, b, b_row, c + row * c_row,
                                           c_row);
}

// `columns` are rounded up to whole vectors, of B and of C. A has its rows, or TRANSPOSED its columns, a_stride apart.
template <bool TRANSPOSED, bool ADD>
static void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, Columns b, float* c,
                    int64_t c_row) {
    if (depth > LONGEST_SUM) {
        const int64_t first = depth / 2;
        product<TRANSPOSED, ADD>(rows, columns, first, a, a_stride, b, c, c_row);
        b.data += first * b.row;
        product<TRANSPOSED, true>(rows, columns, depth - first, a + first * (TRANSPOSED ? a_stride : 1), a_stride, b, c,
                                  c_row);
        return;
    }
    for (int64_t column = 0; column < columns; column += PAIR, b.data += b.pair, c += PAIR)
        if (columns - column > WIDTH)
            product_columns<TRANSPOSED, ADD, 2>(rows, depth, a, a_stride, b.data, b.row, c, c_row);
        else
            product_columns<TRANSPOSED, ADD, 1>(rows, depth, a, a_stride, b.data, b.row, c, c_row);
}

// A WIDTH x WIDTH matrix, row by row: each round moves one bit of the column's number to the row's.
TFM_INLINE void transpose(Floats (&rows)[WIDTH]) {
#pragma GCC unroll 4
    for (int round = 1; round < WIDTH; round *= 2) {
        Floats next[WIDTH];
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH / 2; ++i)
            zip(rows[i], rows[i + WIDTH / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i)
            rows[i] = next[i];
    }
}

// The transpose of `rows` x `columns` numbers times `factor`, in panels of PAIR of those rows: a B of depth `columns`.
// Rows up to a whole vector of them are read.
static void transpose_to_panels(const float* from, int64_t stride, int64_t rows, int64_t columns, float factor,
                                float* to) {
    for (int64_t row = 0; row < rows; row += WIDTH) {
        float* const panel = to + row / PAIR * columns * PAIR + row % PAIR;
        for (int64_t column = 0; column < columns; column += WIDTH) {
            Floats square[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                square[i] = load(from + (row + i) * stride + column);
            transpose(square);
            const int64_t count = columns - column < WIDTH ? columns - column : WIDTH;
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                if (i < count)
                    store(panel + (column + i) * PAIR, square[i] * factor);
        }
    }
}

} // namespace tfm::TFM_ISA
