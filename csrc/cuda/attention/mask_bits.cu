// Masks as bits, read once for every head, tile and pass after it: what tfm/operators/attention/mask_bits.py says.
//
// A warp packs 32 keys of a sequence and a head, a lane a key: it reads 32 neighbouring elements of each query's row,
// and a vote of the lanes is the word. Beside it each lane remembers whether some query may attend to its key, by the
// mask and the window together; a last vote of that is the word of reach. The mask passes once; words are 1/8 of it.
#include "common/attention.h"
#include "cuda/matrix.cuh"

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
    Integers starts;
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
    if (call.starts.data)
        position = call.starts[sequence];
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
    const OnDevice device(a.mask);
    STD_TORCH_CHECK(a.mask.dim() == 4, "attention_mask_bits: expected a mask of 4 dimensions, got ", a.mask.dim());
    const MaskBitTensors bits(a);
    const auto& [is_bool, one_row, batch, heads, queries, keys, width, words, reach] = bits;
    STD_TORCH_CHECK(reach.numel() < int64_t{1} << 31, "attention_mask_bits: expected fewer than 2^31 words, got ",
                    reach.numel());
    const Vector starts(a.starts);
    const auto side = [one_row = one_row](std::optional<int64_t> width) { return one_row || !width ? -1 : *width; };
    const MaskBits call{
        .mask = a.mask.data_ptr(),
        .width = is_bool ? Width::FLOAT : width_of(a.mask.scalar_type()),
        .is_bool = is_bool,
        .mask_sequence = a.mask.stride(0),
        .mask_head = a.mask.stride(1),
        .mask_query = a.mask.stride(2),
        .mask_key = a.mask.stride(3),
        .words = words.numel() > 0 ? static_cast<int32_t*>(words.data_ptr()) : nullptr,
        .reach = static_cast<int32_t*>(reach.data_ptr()),
        .starts = one_row ? Integers{} : integers(starts),
        .queries = queries,
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
