// A causal convolution over each channel's own sequence: the formulas of kernels/causal_conv1d.py.
//
// A vector holds as many channels as it has lanes, step after step: the sums over taps and over steps then need no
// shuffles, whatever the strides. Channels that lie side by side are loaded as such; others are gathered, a sequence of
// each after the other, into scratch memory first. Forward every block of channels of every sequence is a task of its
// own; backward a task goes through all sequences, so that the weights' gradients are summed in one order.
#include "cpu/isa.h"

#include "cpu/activations.h"
#include "cpu/sequences.h"

namespace tfm {

struct Convolution {
    Sequences x, y, dy, dx;
    Sequences initial, final, dinitial, dfinal; // states of W - 1 steps
    const float *taps, *bias;                   // [W, padded D] and [padded D]
    float* sums;                                // [W + 1, padded D]: the gradients of taps and bias
    int64_t sequences, channels, steps, width;
    bool narrow, silu;
};

// Vectors of LANES channels for x, and backward for dz, with W - 1 steps more than a sequence has.
static inline int64_t scratch_rows(const Convolution& call) { return 2 * (call.steps + call.width); }

// Tasks: a block of channels of a sequence each.
TFM_KERNEL(convolve, const Convolution& call, float* scratch, int64_t first, int64_t last)
// Tasks: a block of channels of all sequences each.
TFM_KERNEL(convolve_backward, const Convolution& call, float* scratch, int64_t first, int64_t last)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

// Steps whose products are added up among themselves first, so that a sum of many loses few digits.
constexpr int64_t STEPS_TOGETHER = 32;

// Steps W - 1 before the first to the last, a vector each.
template <class T>
TFM_INLINE void gather(const Convolution& call, const Place& at, float* steps) {
    const int64_t before = call.width - 1, own = at.of(call.x), state = at.of(call.initial);
    for (int64_t i = 0; i < before; ++i)
        store(steps + i * WIDTH,
              call.initial.data ? read<T>(call.initial, state + i * call.initial.step, at.count) : Floats{});
    for (int64_t t = 0; t < call.steps; ++t)
        store(steps + (before + t) * WIDTH, read<T>(call.x, own + t * call.x.step, at.count));
}

// The weights of a few channels.
template <int TAPS>
struct Weights {
    Floats taps[TAPS], bias;

    TFM_INLINE Weights of(const Convolution& call, int64_t channel) {
        Weights found;
        for (int k = 0; k < TAPS; ++k)
            found.taps[k] = load(call.taps + k * padded(call.channels) + channel);
        found.bias = load(call.bias + channel);
        return found;
    }

    // Of the TAPS steps from `first` on.
    Floats sum(const float* first) const {
        Floats total = bias;
        for (int k = 0; k < TAPS; ++k)
            total += taps[k] * load(first + k * WIDTH);
        return total;
    }
};

template <class T, int TAPS>
void forward_of(const Convolution call, const Place at, float* steps) {
    const auto weights = Weights<TAPS>::of(call, at.channel);
    gather<T>(call, at, steps);
    const int64_t own = at.of(call.y);
    for (int64_t t = 0; t < call.steps; ++t) {
        const Floats z = weights.sum(steps + t * WIDTH);
        write<T>(call.y, own + t * call.y.step, call.silu ? activate<Activation::SILU>(z).value : z, at.count);
    }
    const int64_t state = at.of(call.final);
    for (int64_t i = 0; i < call.width - 1; ++i)
        write<T>(call.final, state + i * call.final.step, load(steps + (call.steps + i) * WIDTH), at.count);
}

template <class T, int TAPS>
void backward_of(const Convolution call, const Place at, float* steps) {
    constexpr int BEFORE = TAPS - 1;
    const auto weights = Weights<TAPS>::of(call, at.channel);
    Floats sums[TAPS + 1] = {}, some[TAPS + 1] = {}; // the bias's behind those of the taps
    gather<T>(call, at, steps);
    // dz with W - 1 zeros in front and behind: the steps before the first are the initial state's.
    float* const d_z = steps + (call.steps + BEFORE) * WIDTH;
    for (int64_t i = 0; i < BEFORE; ++i)
        store(d_z + (call.steps + i) * WIDTH, Floats{});
    const int64_t given = at.of(call.dy);
    for (int64_t t = 0; t < call.steps; ++t) {
        Floats gradient = read<T>(call.dy, given + t * call.dy.step, at.count);
        const float* const first = steps + t * WIDTH;
        if (call.silu) {
            const Activated silu = activate<Activation::SILU>(weights.sum(first));
            gradient = gradient * silu.derivative;
        }
        store(d_z + t * WIDTH, gradient);
        for (int k = 0; k < TAPS; ++k)
            some[k] += gradient * load(first + k * WIDTH);
        some[TAPS] += gradient;
        if ((t + 1) % STEPS_TOGETHER == 0 || t + 1 == call.steps)
            for (int k = 0; k <= TAPS; ++k) {
                sums[k] += some[k];
                some[k] = Floats{};
            }
    }
    const int64_t own = at.of(call.dx), d_state = at.of(call.dinitial), d_final = at.of(call.dfinal);
    for (int64_t t = call.dinitial.data ? -BEFORE : 0; t < call.steps; ++t) {
        Floats total{};
        for (int64_t ahead = t < 0 ? -t : 0; ahead < TAPS; ++ahead)
            total += weights.taps[BEFORE - ahead] * load(d_z + (t + ahead) * WIDTH);
        const int64_t kept = t - call.steps + BEFORE; // where the final state has this step
        if (call.dfinal.data && kept >= 0)
            total += read<T>(call.dfinal, d_final + kept * call.dfinal.step, at.count);
        if (t < 0)
            write<T>(call.dinitial, d_state + (t + BEFORE) * call.dinitial.step, total, at.count);
        else
            write<T>(call.dx, own + t * call.dx.step, total, at.count);
    }
    const int64_t row = padded(call.channels);
    for (int k = 0; k <= TAPS; ++k)
        store(call.sums + k * row + at.channel, load(call.sums + k * row + at.channel) + sums[k]);
}

// A number that is known where it is compiled.
template <int N>
struct Number {
    constexpr operator int() const { return N; }
};

// kernel(taps) with the number of taps as such.
template <class Kernel>
TFM_INLINE void with_taps(const Convolution& call, const Kernel& kernel) {
    switch (call.width) {
    case 2:
        return kernel(Number<2>{});
    case 3:
        return kernel(Number<3>{});
    default:
        return kernel(Number<4>{});
    }
}

void convolve(const Convolution& call, float* scratch, int64_t first, int64_t last) {
    for_tasks(call.channels, first, last, [&](Place at) {
        with_taps(call, [&](auto taps) {
            call.narrow ? forward_of<BFloat16, taps>(call, at, scratch) : forward_of<float, taps>(call, at, scratch);
        });
    });
}

void convolve_backward(const Convolution& call, float* scratch, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
        for (int64_t sequence = 0; sequence < call.sequences; ++sequence)
            for_vectors(call.channels, sequence, block, [&](Place at) {
                with_taps(call, [&](auto taps) {
                    call.narrow ? backward_of<BFloat16, taps>(call, at, scratch)
                                : backward_of<float, taps>(call, at, scratch);
                });
            });
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/rows.h"
#include "operators/causal_conv1d.h"

namespace tfm {

namespace {

Sequences sequences_of(const MaybeTensor& x) {
    return x ? Sequences{x->data_ptr(), x->stride(0), x->stride(1), x->stride(2)} : Sequences{};
}

// [D] or [D, W] in fp32, transposed, its rows of whole vectors; 0 where there is none.
std::vector<float> rows_of(const MaybeTensor& x, int64_t channels, int64_t width) {
    std::vector<float> rows(width * padded(channels), 0.0f);
    if (!x)
        return rows;
    const std::vector<float> numbers = numbers_of<float>(*x);
    for (int64_t channel = 0; channel < channels; ++channel)
        for (int64_t k = 0; k < width; ++k)
            rows[k * padded(channels) + channel] = numbers[channel * width + k];
    return rows;
}

// What both ways are told, by either's arguments.
template <class Arguments>
Convolution call_of(const Arguments& a, const std::vector<float>& taps, const std::vector<float>& bias) {
    return {
        .x = sequences_of(a.x),
        .y = {},
        .dy = {},
        .dx = {},
        .initial = sequences_of(a.initial_state),
        .final = {},
        .dinitial = {},
        .dfinal = {},
        .taps = taps.data(),
        .bias = bias.data(),
        .sums = nullptr,
        .sequences = a.x.size(0),
        .channels = a.x.size(1),
        .steps = a.x.size(2),
        .width = a.weight.size(1),
        .narrow = is_narrow(width_of(a.x.scalar_type())),
        .silu = a.silu,
    };
}

std::tuple<Tensor, Tensor> causal_conv1d(const arguments::CausalConv1d& a) {
    const int64_t channels = a.x.size(1), width = a.weight.size(1);
    const auto taps = rows_of(a.weight, channels, width), bias = rows_of(a.bias, channels, 1);
    Tensor y = torch::stable::empty_like(a.x);
    Tensor final = empty({a.x.size(0), channels, width - 1}, a.x.scalar_type(), a.x);
    Convolution call = call_of(a, taps, bias);
    call.y = sequences_of(y);
    call.final = sequences_of(final);
    for_rows(call.sequences * channel_blocks(call.channels), LANES * call.steps, [&](int64_t begin, int64_t end) {
        const Scratch scratch(scratch_rows(call), LANES);
        TFM_RUN(convolve, call, scratch.memory.get(), begin, end);
    });
    return {y, final};
}

std::tuple<Tensor, MaybeTensor, Tensor> causal_conv1d_backward(const arguments::CausalConv1dBackward& a) {
    const int64_t channels = a.x.size(1), width = a.weight.size(1);
    const auto taps = rows_of(a.weight, channels, width), bias = rows_of(a.bias, channels, 1);
    std::vector<float> sums((width + 1) * padded(channels), 0.0f);
    Tensor dx = torch::stable::empty_like(a.x);
    MaybeTensor dinitial;
    if (a.initial_state)
        dinitial = torch::stable::empty_like(*a.initial_state);
    Convolution call = call_of(a, taps, bias);
    call.dy = sequences_of(a.dy);
    call.dx = sequences_of(dx);
    call.dinitial = sequences_of(dinitial);
    call.dfinal = sequences_of(a.dfinal_state);
    call.sums = sums.data();
    for_rows(channel_blocks(call.channels), LANES * call.sequences * call.steps, [&](int64_t begin, int64_t end) {
        const Scratch scratch(scratch_rows(call), LANES);
        TFM_RUN(convolve_backward, call, scratch.memory.get(), begin, end);
    });
    Tensor dparameters = empty({channels * (width + 1)}, ScalarType::Float, a.x);
    float* const to = static_cast<float*>(dparameters.data_ptr());
    for (int64_t channel = 0; channel < channels; ++channel) {
        for (int64_t k = 0; k < width; ++k)
            to[channel * width + k] = sums[k * padded(channels) + channel];
        to[channels * width + channel] = sums[width * padded(channels) + channel];
    }
    return {dx, dinitial, dparameters};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::CausalConv1d, causal_conv1d>(m);
    implement<arguments::CausalConv1dBackward, causal_conv1d_backward>(m);
}

} // namespace tfm

#endif
