// Rotary position embedding of queries and keys: the formulas of kernels/rotary.py.
//
//     a' = a · cos - b · sin        b' = b · cos + a · sin
//
// and with -sin, the transpose, for gradients. Each number is read and written once, heads and tokens in the order in
// which they lie in memory. A few tokens at a time bring their rows of the tables to fp32 once for all heads of query
// and key; rows that are fp32 already are read where they lie. The last vector of a row overlaps the one before it
// instead of stopping short; it is read first, so that a row may also be turned in place.
// Blocks of tokens are shared among threads; no number depends on another, and so no bit on how they are shared.
#include "cpu/isa.h"

#include "cpu/matrix.h"

namespace tfm {

// How many numbers apart.
struct Strides {
    int64_t batch, head, token;
};

// A query or key before and after, which may be one; its columns are neighbours.
struct Turned {
    const void* x;
    void* y;
    Strides x_strides, y_strides;
    int64_t heads, turned; // the heads from `turned` on are copied
};

// cos or sin.
struct Table {
    const void* data;
    bool narrow;                  // bf16
    int64_t batch, token, column; // numbers apart; with `places`: batch 0 and token a row of the table
};

struct Rotary {
    Turned parts[2]; // the second without heads: none
    Table cos, sin;
    const int64_t* places;  // each token's row of the tables; null: each token has its own
    int64_t length, blocks; // of a sequence: tokens, and blocks of them
    int64_t half, columns;
    bool narrow, interleaved, inverse;
};

// Tokens at a time.
constexpr int64_t BLOCK_TOKENS = 16;

// `scratch` has room for 2 BLOCK_TOKENS rows of `half` numbers in whole vectors.
TFM_KERNEL(rotary, const Rotary& call, float* scratch, int64_t first_block, int64_t last_block)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

struct Pairs {
    Floats a, b;
};

// Of a0 b0 a1 b1 ...: what `zip` undoes.
TFM_INLINE Pairs unzip(Floats first, Floats second) {
    const Ints even = 2 * lanes();
    return {__builtin_shuffle(first, second, even), __builtin_shuffle(first, second, even + 1)};
}

// Pairs `column` to `column` + WIDTH of a row, or `count` of them where those are fewer; the rest is 0.
template <bool INTERLEAVED, class T>
TFM_INLINE Pairs read_pairs(const T* row, int64_t half, int64_t column, int64_t count) {
    if (!INTERLEAVED)
        return {load(row + column, count), load(row + half + column, count)};
    row += 2 * column;
    return unzip(load(row, 2 * count), 2 * count > WIDTH ? load(row + WIDTH, 2 * count - WIDTH) : Floats{});
}

template <bool INTERLEAVED, class T>
TFM_INLINE void write_pairs(T* row, int64_t half, int64_t column, int64_t count, Pairs pairs) {
    if (!INTERLEAVED) {
        store(row + column, pairs.a, count);
        store(row + half + column, pairs.b, count);
        return;
    }
    Floats first, second;
    zip(pairs.a, pairs.b, first, second);
    row += 2 * column;
    store(row, first, 2 * count);
    if (2 * count > WIDTH)
        store(row + WIDTH, second, 2 * count - WIDTH);
}

// `flip` holds the sign bit where sin changes its sign.
TFM_INLINE Pairs turn(Pairs pairs, Floats cosine, Floats sine, Ints flip) {
    sine = (Floats)((Ints)sine ^ flip);
    return {pairs.a * cosine - pairs.b * sine, pairs.b * cosine + pairs.a * sine};
}

template <bool INTERLEAVED, class T>
TFM_INLINE void turn_row(const T* x, T* y, const float* cosine, const float* sine, Ints flip, int64_t half) {
    const auto turned = [&](int64_t column, int64_t count) {
        return turn(read_pairs<INTERLEAVED>(x, half, column, count), load(cosine + column, count),
                    load(sine + column, count), flip);
    };
    if (half < WIDTH) {
        write_pairs<INTERLEAVED>(y, half, 0, half, turned(0, half));
        return;
    }
    const int64_t last = half - WIDTH;
    const Pairs ends = turned(last, WIDTH);
    for (int64_t column = 0; column < last; column += WIDTH)
        write_pairs<INTERLEAVED>(y, half, column, WIDTH, turned(column, WIDTH));
    write_pairs<INTERLEAVED>(y, half, last, WIDTH, ends);
}

// A row of a table in fp32: where it lies, if it lies so, else in `scratch`.
TFM_INLINE const float* angles(const Table& table, int64_t place, int64_t half, float* scratch) {
    const float* const wide = static_cast<const float*>(table.data) + place;
    if (!table.narrow && table.column == 1)
        return wide;
    const BFloat16* const narrow = static_cast<const BFloat16*>(table.data) + place;
    if (table.column == 1) {
        for (int64_t column = 0; column < half; column += WIDTH)
            store(scratch + column, load(narrow + column, half - column));
        return scratch;
    }
    for (int64_t column = 0; column < half; ++column) {
        const int64_t apart = column * table.column;
        scratch[column] = table.narrow ? load(narrow + apart, 1)[0] : wide[apart];
    }
    return scratch;
}

template <bool INTERLEAVED, class T>
void turn_blocks(const Rotary call, float* scratch, int64_t first_block, int64_t last_block) {
    const Ints flip = call.inverse ? Ints{} + INT32_MIN : Ints{};
    const float *cosines[BLOCK_TOKENS], *sines[BLOCK_TOKENS];
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t batch = block / call.blocks, first = block % call.blocks * BLOCK_TOKENS;
        const int64_t tokens = first + BLOCK_TOKENS < call.length ? BLOCK_TOKENS : call.length - first;
        for (int64_t i = 0; i < tokens; ++i) {
            const int64_t row = call.places ? call.places[batch * call.length + first + i] : first + i;
            float* const space = scratch + 2 * i * padded(call.half);
            cosines[i] = angles(call.cos, batch * call.cos.batch + row * call.cos.token, call.half, space);
            sines[i] =
                angles(call.sin, batch * call.sin.batch + row * call.sin.token, call.half, space + padded(call.half));
        }
        for (const Turned& part : call.parts) {
            const bool heads_first = part.x_strides.head < part.x_strides.token; // in the order of memory
            const int64_t outer = heads_first ? tokens : part.heads, inner = heads_first ? part.heads : tokens;
            for (int64_t far = 0; far < outer; ++far)
                for (int64_t near = 0; near < inner; ++near) {
                    const int64_t head = heads_first ? near : far, i = heads_first ? far : near;
                    const T* const x = static_cast<const T*>(part.x) + batch * part.x_strides.batch +
                                       head * part.x_strides.head + (first + i) * part.x_strides.token;
                    T* const y = static_cast<T*>(part.y) + batch * part.y_strides.batch + head * part.y_strides.head +
                                 (first + i) * part.y_strides.token;
                    const int64_t turned = head < part.turned ? 2 * call.half : 0;
                    if (turned)
                        turn_row<INTERLEAVED>(x, y, cosines[i], sines[i], flip, call.half);
                    if (x != y && turned < call.columns)
                        __builtin_memcpy(y + turned, x + turned, (call.columns - turned) * sizeof(T));
                }
        }
    }
}

void rotary(const Rotary& call, float* scratch, int64_t first_block, int64_t last_block) {
    if (call.narrow)
        call.interleaved ? turn_blocks<true, BFloat16>(call, scratch, first_block, last_block)
                         : turn_blocks<false, BFloat16>(call, scratch, first_block, last_block);
    else
        call.interleaved ? turn_blocks<true, float>(call, scratch, first_block, last_block)
                         : turn_blocks<false, float>(call, scratch, first_block, last_block);
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/integers.h"
#include "cpu/rows.h"
#include "operators/rotary.h"

namespace tfm {

namespace {

// (batch, tokens of each) of x [B, H, S, D], or packed [N, H, D].
std::vector<int64_t> tokens_of(const Tensor& x) {
    return x.dim() == 3 ? std::vector<int64_t>{1, x.size(0)} : std::vector<int64_t>{x.size(0), x.size(2)};
}

Strides strides_of(const Tensor& x) {
    return x.dim() == 3 ? Strides{0, x.stride(1), x.stride(0)} : Strides{x.stride(0), x.stride(1), x.stride(2)};
}

// Still empty, its tokens and heads in the order of x's memory.
Tensor output_of(const Tensor& x) {
    return is_side_by_side(x) ? torch::stable::empty_like(x) : empty(shape_of(x), x.scalar_type(), x);
}

// The strides between the rows of a table [*tokens, half], 0 where it is broadcast; with positions it is [rows, half].
Table table_of(const Tensor& x, bool by_position) {
    const int64_t column = x.dim() - 1;
    const auto step = [&](int64_t dim) { return dim < 0 || x.size(dim) == 1 ? 0 : x.stride(dim); };
    return {
        .data = x.const_data_ptr(),
        .narrow = is_narrow(width_of(x.scalar_type())),
        .batch = by_position ? 0 : step(column - 2),
        .token = step(column - 1),
        .column = x.size(column) > 1 ? x.stride(column) : 1,
    };
}

Turned part_of(const Tensor& x, const Tensor& y, int64_t turned) {
    return {x.const_data_ptr(), y.data_ptr(), strides_of(x), strides_of(y), x.size(1), turned};
}

// Columns of x, y, other and its y are neighbours.
void run(const Tensor& x, const Tensor& y, const MaybeTensor& other, const MaybeTensor& other_y, const Tensor& cos,
         const Tensor& sin, const MaybeTensor& positions, int64_t turned, bool interleaved, bool inverse) {
    const std::vector<int64_t> tokens = tokens_of(x);
    Numbers places;
    if (positions) {
        places = numbers_of(*positions, tokens);
        check_inside("positions", places, cos.size(0));
    }
    const int64_t blocks = (tokens[1] + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const int64_t half = cos.size(cos.dim() - 1), columns = x.size(x.dim() - 1);
    const Rotary call{
        .parts = {part_of(x, y, turned), other ? part_of(*other, *other_y, other->size(1)) : Turned{}},
        .cos = table_of(cos, positions.has_value()),
        .sin = table_of(sin, positions.has_value()),
        .places = positions ? places.data() : nullptr,
        .length = tokens[1],
        .blocks = blocks,
        .half = half,
        .columns = columns,
        .narrow = is_narrow(width_of(x.scalar_type())),
        .interleaved = interleaved,
        .inverse = inverse,
    };
    const int64_t heads = x.size(1) + (other ? other->size(1) : 0);
    for_rows(tokens[0] * blocks, BLOCK_TOKENS * heads * columns, [&](int64_t begin, int64_t end) {
        const Scratch scratch(2 * BLOCK_TOKENS, half);
        TFM_RUN(rotary, call, scratch.memory.get(), begin, end);
    });
}

std::tuple<Tensor, MaybeTensor> rotary(const arguments::Rotary& a) {
    Tensor y = output_of(a.x);
    MaybeTensor other_y, other_x;
    if (a.other) {
        other_y = output_of(*a.other);
        other_x = side_by_side(*a.other);
    }
    run(side_by_side(a.x), y, other_x, other_y, a.cos, a.sin, a.positions, a.turned, a.interleaved, a.inverse);
    return {y, other_y};
}

// Two copies more where columns are not neighbours.
void rotary_(const arguments::Rotary_& a) {
    Tensor x = a.x, part = torch::stable::narrow(x, 1, 0, a.heads);
    Tensor y = side_by_side(part);
    run(y, y, {}, {}, a.cos, a.sin, a.positions, a.heads, a.interleaved, false);
    if (!is_side_by_side(part))
        torch::stable::copy_(part, y);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::Rotary, rotary>(m);
    implement<arguments::Rotary_, rotary_>(m);
}

} // namespace tfm

#endif
