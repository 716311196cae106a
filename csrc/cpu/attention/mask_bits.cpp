// Masks as bits, read once a call: kernels/attention/mask_bits.py says what words and reach hold.
//
// A task is one head of a sequence. 32 numbers of a row become a word; the word goes to words, and, with the bits that
// the window leaves, into the reach of all queries.
#include "cpu/isa.h"

#include "cpu/attention/call.h"

namespace tfm {

enum class MaskType : int8_t { BOOL, FLOAT, BFLOAT16 };

struct MaskBits {
    const void* mask;
    MaskType type;
    int64_t sequence, head, row, column; // strides of the mask
    int32_t* words;                      // [word_sequences, heads, queries, width]; null where there are none
    int32_t* reach;                      // [sequences, heads, width]
    const int64_t* starts;               // of each sequence
    int64_t word_sequences, heads, queries, keys, width, left, right;
};

TFM_KERNEL(mask_bits, const MaskBits& call, int64_t first_pair, int64_t last_pair)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/vector.h"

namespace tfm::TFM_ISA {

namespace {

bool allows(uint8_t value) { return value != 0; }
bool allows(float value) { return value != -__builtin_inff(); }
bool allows(BFloat16 value) { return value.bits != 0xFF80; }

template <class T>
uint32_t word_of(const T* from, int64_t step, int64_t count) {
    uint32_t word = 0;
    if (count == 32 && step == 1)
        for (int i = 0; i < 32; ++i)
            word |= static_cast<uint32_t>(allows(from[i])) << i;
    else
        for (int64_t i = 0; i < count; ++i)
            word |= static_cast<uint32_t>(allows(from[i * step])) << i;
    return word;
}

uint32_t word_at(const MaskBits& call, int64_t place, int64_t count) {
    if (call.type == MaskType::BOOL)
        return word_of(static_cast<const uint8_t*>(call.mask) + place, call.column, count);
    if (call.type == MaskType::FLOAT)
        return word_of(static_cast<const float*>(call.mask) + place, call.column, count);
    return word_of(static_cast<const BFloat16*>(call.mask) + place, call.column, count);
}

// Bits [begin, end) of 32.
uint32_t bits_between(int64_t begin, int64_t end) {
    begin = larger(begin, 0), end = smaller(end, 32);
    return begin >= end ? 0 : static_cast<uint32_t>(((uint64_t(1) << end) - 1) & ~((uint64_t(1) << begin) - 1));
}

} // namespace

void mask_bits(const MaskBits& call, int64_t first_pair, int64_t last_pair) {
    for (int64_t pair = first_pair; pair < last_pair; ++pair) {
        const int64_t sequence = pair / call.heads, head = pair % call.heads;
        int32_t* const reach = call.reach + pair * call.width;
        for (int64_t word = 0; word < call.width; ++word)
            reach[word] = 0;
        for (int64_t query = 0; query < call.queries; ++query) {
            const int64_t row = sequence * call.sequence + head * call.head + query * call.row;
            const int64_t position = query + call.starts[sequence];
            int32_t* const words = call.words && sequence < call.word_sequences
                                       ? call.words + (pair * call.queries + query) * call.width
                                       : nullptr;
            for (int64_t word = 0; word < call.width; ++word) {
                const int64_t key = word * 32, count = smaller(call.keys - key, 32);
                const uint32_t bits = count > 0 ? word_at(call, row + key * call.column, count) : 0;
                if (words)
                    words[word] = static_cast<int32_t>(bits);
                reach[word] |= static_cast<int32_t>(
                    bits & bits_between(position - call.left - key, position + call.right + 1 - key));
            }
        }
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/attention/host.h"
#include "cpu/rows.h"

namespace tfm {

namespace {

std::tuple<Tensor, Tensor> attention_mask_bits(const arguments::AttentionMaskBits& a) {
    const MaskBitTensors bits(a);
    const auto& [is_bool, one_row, batch, heads, queries, keys, width, words, reach] = bits;
    const int64_t sequences = reach.size(0);
    const std::vector<int64_t> given =
        a.starts && !one_row ? numbers_of<int64_t>(*a.starts) : std::vector<int64_t>(sequences, a.start);
    const MaskBits call{
        .mask = a.mask.const_data_ptr(),
        .type = is_bool                   ? MaskType::BOOL
                : heads_of(a.mask).narrow ? MaskType::BFLOAT16
                                          : MaskType::FLOAT,
        .sequence = batch > 1 ? a.mask.stride(0) : 0,
        .head = a.mask.stride(1),
        .row = a.mask.stride(2),
        .column = a.mask.stride(3),
        .words = words.numel() > 0 ? static_cast<int32_t*>(words.data_ptr()) : nullptr,
        .reach = static_cast<int32_t*>(reach.data_ptr()),
        .starts = given.data(),
        .word_sequences = batch,
        .heads = heads,
        .queries = queries,
        .keys = keys,
        .width = width,
        .left = one_row ? OPEN : a.left.value_or(OPEN),
        .right = one_row ? OPEN : a.right.value_or(OPEN),
    };
    for_rows(sequences * heads, call.queries * keys,
             [&](int64_t begin, int64_t end) { TFM_RUN(mask_bits, call, begin, end); });
    return {words, reach};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) { implement<arguments::AttentionMaskBits, attention_mask_bits>(m); }

} // namespace tfm

#endif
