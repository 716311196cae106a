// Masks as bits, read once for every head, tile and pass after it: what tfm/operators/attention/mask_bits.py says.
//
// A warp packs 32 keys of a sequence and a head, a lane a key: it reads 32 neighbouring elements of each query's row,
// and a vote of the lanes is the word. Beside it each lane remembers whether some query may attend to its key, by the
// mask and the window together; a last vote of that is the word of reach. The mask passes once; words are 1/8 of it.
#include "cuda/matrix.cuh"
#include "operators/attention.h"

namespace tfm::cuda {

namespace {

constexpr int WARPS = 4;

struct MaskBits {
    const void* mask; // bool where `is_bool`
    Width width;
    bool is_bool;
    int64_t mask_sequence, mask_head, mask_query, mask_key;
    int32_t* words; // [mask_sequences, heads, queries, width], null where there are none
    int32_t* reach; // [sequences, heads, width]
    const void* starts;
    bool starts_are_wide;
    int64_t queries, keys;
    int tasks, mask_sequences, heads, row_words;
    int64_t start, left, right; // a side below 0 is open
};

__global__ void __launch_bounds__(WARPS* WARP) mask_bits_kernel(MaskBits call) {
    const int lane = threadIdx.x % WARP;
    const int task = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (task >= call.tasks)
        return;
    const int word = task % call.row_words, pair = task / call.row_words, key = word * WARP + lane;
    const int64_t head = pair % call.heads, sequence = pair / call.heads;
    const int64_t mask_sequence = call.mask_sequences == 1 ? 0 : sequence;
    const int64_t first = mask_sequence * call.mask_sequence + head * call.mask_head + key * call.mask_key;
    int64_t position = call.start;
    if (call.starts)
        position = call.starts_are_wide ? static_cast<const int64_t*>(call.starts)[sequence]
                                        : static_cast<const int32_t*>(call.starts)[sequence];
    bool is_reached = false;
    for (int64_t query = 0; query < call.queries; ++query, ++position) {
        const int64_t place = first + query * call.mask_query;
        bool allowed = false;
        if (key < call.keys)
            allowed = call.is_bool ? static_cast<const uint8_t*>(call.mask)[place] != 0
                                   : at({const_cast<void*>(call.mask), call.width, 0}, place,
                                        [](const auto* from) { return widen(*from) != -INFINITY; });
        const unsigned bits = __ballot_sync(ALL_LANES, allowed);
        if (call.words && sequence < call.mask_sequences && lane == 0)
            call.words[((sequence * call.heads + head) * call.queries + query) * call.row_words + word] =
                static_cast<int32_t>(bits);
        is_reached |= allowed && (call.left < 0 || key >= position - call.left) &&
                      (call.right < 0 || key <= position + call.right);
    }
    const unsigned bits = __ballot_sync(ALL_LANES, is_reached);
    if (lane == 0)
        call.reach[task] = static_cast<int32_t>(bits);
}

std::tuple<Tensor, Tensor> attention_mask_bits(const arguments::AttentionMaskBits& a) {
    // Rows of words are whole tiles of the kernels for any length.
    constexpr int64_t KEYS_OF_A_ROW = 256;
    const OnDevice device(a.mask);
    STD_TORCH_CHECK(a.mask.dim() == 4, "attention_mask_bits: expected a mask of 4 dimensions, got ", a.mask.dim());
    const int64_t batch = a.mask.size(0), heads = a.mask.size(1), keys = a.mask.size(3);
    const bool is_bool = a.mask.scalar_type() == ScalarType::Bool,
               one_row = a.mask.size(2) == 1 || a.mask.stride(2) == 0;
    const int64_t width = divide_up(keys, KEYS_OF_A_ROW) * KEYS_OF_A_ROW / WARP;
    const int64_t rows = !is_bool || one_row ? 0 : a.mask.size(2);
    const int64_t sequences = !a.starts || one_row ? batch : a.starts->size(0);
    const Tensor words = empty({batch, heads, rows, width}, ScalarType::Int, a.mask),
                 reach = empty({sequences, heads, width}, ScalarType::Int, a.mask);
    STD_TORCH_CHECK(reach.numel() < int64_t{1} << 31, "attention_mask_bits: expected fewer than 2^31 words, got ",
                    reach.numel());
    MaybeTensor dense_starts = a.starts ? MaybeTensor(torch::stable::contiguous(*a.starts)) : a.starts;
    // The reach of one row is the row itself: the window is the attention kernels' business.
    const auto side = [&](std::optional<int64_t> width) { return one_row || !width ? -1 : *width; };
    const MaskBits call{
        .mask = a.mask.data_ptr(),
        .width = is_bool ? Width::FLOAT : width_of(a.mask.scalar_type()),
        .is_bool = is_bool,
        .mask_sequence = a.mask.stride(0),
        .mask_head = a.mask.stride(1),
        .mask_query = a.mask.stride(2),
        .mask_key = a.mask.stride(3),
        .words = rows > 0 ? static_cast<int32_t*>(words.data_ptr()) : nullptr,
        .reach = static_cast<int32_t*>(reach.data_ptr()),
        .starts = one_row ? nullptr : data_of<const void>(dense_starts),
        .starts_are_wide = a.starts && a.starts->scalar_type() == ScalarType::Long,
        .queries = one_row ? std::min<int64_t>(a.mask.size(2), 1) : a.mask.size(2),
        .keys = keys,
        .tasks = static_cast<int>(reach.numel()),
        .mask_sequences = static_cast<int>(batch),
        .heads = static_cast<int>(heads),
        .row_words = static_cast<int>(width),
        .start = a.start,
        .left = side(a.left),
        .right = side(a.right),
    };
    if (call.tasks > 0)
        launch(mask_bits_kernel, dim3(divide_up(call.tasks, WARPS)), dim3(WARPS * WARP), 0, device.stream, call);
    return {words, reach};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, TFM_CUDA_KEY, m) {
    implement<arguments::AttentionMaskBits, attention_mask_bits>(m);
}

} // namespace tfm::cuda
