// Attention over at most 256 queries and keys of at most 64 columns, fp16 and bf16, on tensor cores: the host part.
//
// The device's part is in short_forward.cuh and short_backward.cuh, what both share in
// short.cuh and short_tiles.cuh. tfm/operators/attention says what each argument is.
//
// A translation batch of 256 sentences of some 14 tokens and at most 34, 8 heads of 64, is 2,048 (sentence, head) pairs
// of 1.8 KB a matrix: 3.7 MB each of q, k, v and out. Of the forward an H200's multiprocessor holds 14 pairs, a warp
// each, so all 2,048 come in 1.1 waves, and most have one step of 16 keys; the 14.7 MB take 3.5 us from memory, less
// from the second-level cache. Of the backward it holds 5 pairs of 3 warps, 4 with dropout: 3.1 or 3.9 waves of some 2
// us, 25.7 MB. Predicted: forward 4 to 5 us, backward 7 to 9 us. The Triton twin's tile has 64 keys once the longest
// sentence has 33; it holds 10 pairs (1.6 waves, four times the products) and 3 (5.2 waves): predicted 7 and 13 us.
#include "common/attention.h"
#include "cuda/attention/short_backward.cuh"
#include "cuda/attention/short_forward.cuh"

namespace tfm::cuda::short_attention {

namespace {

using MaybeInt = std::optional<int64_t>;

// Steps along [B, H, S, D], or [N, H, D] whose sequences are told apart by their rows.
Matrices matrices(const MaybeTensor& x) {
    if (!x)
        return {};
    const auto step = [&](int64_t dim) { return x->size(dim) > 1 ? x->stride(dim) : 0; };
    const int64_t dims = x->dim(), row = dims == 4 ? 2 : 0;
    Matrices found{x->data_ptr(), dims == 4 ? step(0) : 0, step(1), step(row), x->stride(dims - 1), false};
    found.by_chunks = found.column == 1 && (found.sequence | found.head | found.row) % CHUNK == 0 &&
                      reinterpret_cast<uintptr_t>(found.data) % (CHUNK * x->element_size()) == 0;
    return found;
}

struct Steps {
    int64_t sequence, head, row;
};

// Of what has a number for each query and head, behind `before` other dimensions.
Steps steps_of(const Tensor& numbers, int64_t before = 0) {
    if (numbers.dim() == before + 3)
        return {numbers.stride(before), numbers.stride(before + 1), numbers.stride(before + 2)};
    return {0, numbers.stride(before + 1), numbers.stride(before)};
}

// A tensor that broadcasts over (sequence, head, query), its keys side by side: 0 along dimensions of size 1.
Steps broadcast_steps(const MaybeTensor& x) {
    const auto step = [&](int64_t dim) { return x && dim < x->dim() - 1 && x->size(dim) > 1 ? x->stride(dim) : 0; };
    return {step(0), step(1), step(2)};
}

// What `attention` is told, checked, with what it holds kept alive.
struct Problem {
    Vector cu_seq_q, cu_seq_k, key_lengths, starts;
    ExtraScoreTensors extra;
    Width width;
    Call call;

    // Of the arguments of Attention, or of an operator that has them among its own.
    template <class Arguments>
    explicit Problem(const Arguments& a)
        : cu_seq_q(a.cu_seq_q), cu_seq_k(a.cu_seq_k), key_lengths(a.key_lengths), starts(a.starts), extra(a) {
        const ScalarType type = a.query.scalar_type();
        STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                        "native attention: expected float16 or bfloat16; impl=\"triton\" serves other dtypes");
        STD_TORCH_CHECK(a.key.scalar_type() == type && a.value.scalar_type() == type,
                        "native attention: expected query, key and value of one dtype");
        const int64_t dim = a.query.size(a.query.dim() - 1), value_dim = a.value.size(a.value.dim() - 1);
        for (const int64_t columns : {dim, value_dim})
            STD_TORCH_CHECK(columns > 0 && columns <= MOST_COLUMNS && columns % CHUNK == 0,
                            "native attention: expected head dims that are multiples of 8 up to ", MOST_COLUMNS,
                            ", got ", columns);
        STD_TORCH_CHECK(a.max_q <= MOST_QUERIES && a.max_k <= MOST_KEYS, "native attention: expected at most ",
                        MOST_QUERIES, " queries and ", MOST_KEYS, " keys in a sequence, got ", a.max_q, " and ",
                        a.max_k);
        const int64_t sequences = sequences_of(a);
        for (const int64_t count : {sequences, a.query.size(0), a.key.size(0)})
            STD_TORCH_CHECK(count * a.query.size(1) < int64_t{1} << 31,
                            "native attention: expected sequences, and rows, times heads below 2^31, got ",
                            count * a.query.size(1));
        STD_TORCH_CHECK(!a.bias || a.bias->size(3) <= 1 || a.bias->stride(3) == 1,
                        "native attention: expected a bias whose keys lie side by side, got step ",
                        a.bias ? a.bias->stride(3) : 0);
        STD_TORCH_CHECK(!a.key_mask, "native attention: expected no mask beside that of the keys; impl=\"triton\" "
                                     "serves both");
        STD_TORCH_CHECK(!a.relative_bias, "native attention: expected no bias by distance; impl=\"triton\" serves it");
        const Steps bias_steps = broadcast_steps(a.bias), words_steps = broadcast_steps(a.words),
                    reach_steps = broadcast_steps(a.reach);
        const auto side = [](MaybeInt width) { return static_cast<int>(width ? std::min<int64_t>(*width, FAR) : -1); };
        width = width_of(type);
        call = {
            .query = matrices(a.query),
            .key = matrices(a.key),
            .value = matrices(a.value),
            .bias = {data_of<void>(a.bias), a.bias ? width_of(a.bias->scalar_type()) : Width::FLOAT, bias_steps.row},
            .bias_sequence = bias_steps.sequence,
            .bias_head = bias_steps.head,
            .words = data_of<const int32_t>(a.words),
            .words_sequence = words_steps.sequence,
            .words_head = words_steps.head,
            .words_row = words_steps.row,
            .reach = data_of<const int32_t>(a.reach),
            .reach_sequence = reach_steps.sequence,
            .reach_head = reach_steps.head,
            .extra_scores = matrix(extra.scores),
            .extra_gradients = data_of<float>(extra.partials),
            .cu_seq_q = integers(cu_seq_q),
            .cu_seq_k = integers(cu_seq_k),
            .key_lengths = integers(key_lengths),
            .starts = integers(starts),
            .tops = nullptr,
            .tops_sequence = 0,
            .tops_head = 0,
            .to_logs = 0,
            .sequences = static_cast<int>(sequences),
            .heads = static_cast<int>(a.query.size(1)),
            .group = static_cast<int>(a.query.size(1) / a.key.size(1)),
            .query_size = static_cast<int>(a.max_q),
            .key_size = static_cast<int>(a.max_k),
            .dim = static_cast<int>(dim),
            .value_dim = static_cast<int>(value_dim),
            .start = static_cast<int>(std::clamp<int64_t>(a.start, -FAR, FAR)),
            .left = side(a.left),
            .right = side(a.right),
            .inner = static_cast<float>(a.softcap ? a.scale / *a.softcap : a.scale),
            .outer = static_cast<float>(a.softcap.value_or(0.0)),
            .dropout = dropout_of(a.seed, a.dropout_p, a.site),
        };
    }

    void set_statistics(const Tensor& statistics) {
        const Steps steps = steps_of(statistics, 1);
        STD_TORCH_CHECK(steps.row == 1 || statistics.numel() <= 2 ||
                            statistics.size(statistics.dim() == 4 ? 3 : 1) == 1,
                        "native attention: expected statistics whose queries lie side by side, got step ", steps.row);
        call.tops = static_cast<float*>(statistics.data_ptr());
        call.tops_sequence = steps.sequence;
        call.tops_head = steps.head;
        call.to_logs = statistics.stride(0);
    }
};

// out and the statistics of all queries. One launch.
void forward(const Call& call, const Matrices& out, Width width, cudaStream_t stream) {
    const int key_tiles = divide_up(call.key_size, TILE), query_tiles = divide_up(call.query_size, TILE);
    const int pairs = call.sequences * call.heads;
    if (pairs == 0 || query_tiles == 0)
        return;
    const bool one_warp = key_tiles <= MOST_TILES_OF_A_WARP;
    const int warps = one_warp ? 1 : min(query_tiles, MAX_WARPS);
    const int pairs_of_block = one_warp ? (key_tiles <= 2 ? 4 : 2) : 1;
    const dim3 grid(divide_up(pairs, pairs_of_block), one_warp ? 1 : divide_up(query_tiles, warps));
    choose(call, false, width, [&]<class T, int DIM, bool DROPS, bool EXTRAS>() {
        const size_t bytes = sizeof(T) * pairs_of_block * (2 * key_tiles + warps) * MATRIX<DIM>;
        launch(forward_kernel<T, DIM, DROPS, EXTRAS>, grid, dim3(pairs_of_block * warps * WARP), bytes, stream, call,
               out, warps, key_tiles);
    });
}

// Every gradient that is wanted. One launch, two where keys are more than 64.
void backward(const Call& call, const Gradients& gradients, Width width, cudaStream_t stream) {
    const int warps = max(1, divide_up(call.key_size, TILE)), pairs_of_block = warps == 1 ? 4 : 1;
    const int pairs = call.sequences * (call.heads / call.group);
    if (pairs == 0)
        return;
    choose(call, gradients.lse, width, [&]<class T, int DIM, bool DROPS, bool EXTRAS>() {
        const auto launch_part = [&]<Part PART>() {
            // Long sequences are few instances: all rules are asked for at run time.
            launch(backward_kernel<T, DIM, DROPS, (EXTRAS || PART != Part::ALL), PART>,
                   dim3(divide_up(pairs, pairs_of_block)), dim3(pairs_of_block * warps * WARP),
                   sizeof(T) * pairs_of_block * Room<DIM>::of_pair(warps), stream, call, gradients, warps);
        };
        if (warps > most_warps(Part::ALL)) {
            if (gradients.value.data)
                launch_part.template operator()<Part::VALUE>();
            if (gradients.query.data || gradients.key.data || call.extra_gradients)
                launch_part.template operator()<Part::REST>();
            return;
        }
        launch_part.template operator()<Part::ALL>();
    });
}

std::tuple<Tensor, Tensor> attention(const arguments::Attention& a) {
    const OnDevice device(a.query);
    Problem problem(a);
    const Tensor output = rows_like(a.query, a.value.size(a.value.dim() - 1)), statistics = row_statistics(a.query);
    problem.set_statistics(statistics);
    forward(problem.call, matrices(output), problem.width, device.stream);
    return {output, statistics};
}

using GradientTensors = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

GradientTensors attention_backward(const arguments::AttentionBackward& a) {
    const OnDevice device(a.query);
    STD_TORCH_CHECK(a.wanted.size() == 6, "native attention: expected 6 wanted gradients, got ", a.wanted.size());
    STD_TORCH_CHECK(!a.wanted[3],
                    "native attention: expected a bias without a gradient; impl=\"triton\" serves one that learns");
    STD_TORCH_CHECK(a.dout.scalar_type() == a.query.scalar_type(),
                    "native attention: expected dout in the dtype of query");
    STD_TORCH_CHECK(!a.dlse || a.dlse->scalar_type() == ScalarType::Float,
                    "native attention: expected dlse in float32");
    Problem problem(a);
    problem.set_statistics(a.statistics);
    const MaybeTensor dq = gradient_like(a.wanted[0], a.query), dk = gradient_like(a.wanted[1], a.key),
                      dv = gradient_like(a.wanted[2], a.value);
    const Steps dlse_steps = a.dlse ? steps_of(*a.dlse) : Steps{};
    const Gradients gradients{
        .out = matrices(a.dout),
        .lse = data_of<const float>(a.dlse),
        .lse_sequence = dlse_steps.sequence,
        .lse_head = dlse_steps.head,
        .lse_row = dlse_steps.row,
        .query = matrices(dq),
        .key = matrices(dk),
        .value = matrices(dv),
        .scale = static_cast<float>(a.scale),
    };
    backward(problem.call, gradients, problem.width, device.stream);
    MaybeTensor dextra;
    if (const MaybeTensor& partials = problem.extra.partials) {
        const std::array<int64_t, 2> over_sequences{0, 1};
        const Tensor sum = torch::stable::sum(*partials, torch::headeronly::IntHeaderOnlyArrayRef(over_sequences));
        const ScalarType type = problem.extra.scores.tensor->scalar_type();
        dextra = type == ScalarType::Float ? sum : torch::stable::to(sum, type);
    }
    return {dq, dk, dv, MaybeTensor(), dextra, MaybeTensor()};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, TFM_CUDA_KEY, m) {
    implement<arguments::Attention, attention>(m);
    implement<arguments::AttentionBackward, attention_backward>(m);
}

} // namespace tfm::cuda::short_attention
