// The real-gated linear recurrent unit: the formulas of kernels/rg_lru.py.
//
// A vector holds as many channels as it has lanes, and its state stays in registers from step to step. Every block of
// channels of every sequence is a task of its own, both ways; what the backward sums over steps is added up over the
// sequences afterwards, in their order. Of a step only a product and a sum wait for the step before.
#include "cpu/isa.h"

#include "cpu/activations.h"
#include "cpu/sequences.h"

namespace tfm {

struct RgLru {
    Matrix param; // [D]
    Sequences x, input_gate, recurrence_gate, y, dy, dx, dinput_gate, drecurrence_gate;
    const bool* reset; // [B, S]; null: nothing is reset
    int64_t reset_sequence, reset_step;
    const float *initial, *dfinal; // states: [B, D]; null: absent
    float *final, *dinitial;
    float* kept; // [B, chunks, D], the states before each chunk of steps; null: they are not kept
    float* sums; // [B, D]: the gradient of param
    int64_t channels, steps, chunk;
    bool narrow;

    // One even where there is no step: the state before the first is kept.
    int64_t chunks() const { return steps == 0 ? 1 : (steps + chunk - 1) / chunk; }
};

// Tasks: a block of channels of a sequence each.
TFM_KERNEL(rg_lru_forward, const RgLru& call, int64_t first, int64_t last)
// Scratch: a vector of LANES channels for each step of a chunk.
TFM_KERNEL(rg_lru_backward, const RgLru& call, float* scratch, int64_t first, int64_t last)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

constexpr float C = 8.0f, STEEPEST = 1000.0f;

TFM_INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#else
    return (Floats)vsqrtq_f32((float32x4_t)x);
#endif
}

// What a step makes of its gates: a, √(1 - a²), and how much of x enters.
struct Gates {
    Activated entering, staying;
    Floats a, scale;
};

template <class T>
TFM_INLINE Gates gates_of(const RgLru& call, const Place& at, int64_t t, Floats rate) {
    const Activated entering =
        logistic(read<T>(call.input_gate, at.of(call.input_gate) + t * call.input_gate.step, at.count));
    const Activated staying =
        logistic(read<T>(call.recurrence_gate, at.of(call.recurrence_gate) + t * call.recurrence_gate.step, at.count));
    const Floats log_a = -rate * staying.value, a = exp(log_a), twice = log_a + log_a;
    // Near 1 the digits of a are spent on its nearness.
    const Floats left = twice > -0.34f ? -(twice + bend_of_exp(twice)) : 1.0f - a * a;
    return {entering, staying, a, square_root(left)};
}

TFM_INLINE bool is_fresh(const RgLru& call, const Place& at, int64_t t) {
    return call.reset && call.reset[at.sequence * call.reset_sequence + t * call.reset_step];
}

template <class T>
TFM_INLINE Floats advance(const RgLru& call, const Place& at, int64_t t, Floats state, Floats rate) {
    const Gates gates = gates_of<T>(call, at, t, rate);
    const Floats gated = gates.entering.value * read<T>(call.x, at.of(call.x) + t * call.x.step, at.count);
    return is_fresh(call, at, t) ? gated : gates.a * state + gates.scale * gated;
}

// What the channels of a place have throughout.
struct Constants {
    Floats param, rate;
    int64_t place; // of a state
    float* kept;

    Constants(const RgLru& call, const Place& at)
        : param(get(call.param, at.channel, at.count)), rate(C * softplus(param)),
          place(at.sequence * call.channels + at.channel),
          kept(call.kept ? call.kept + at.sequence * call.chunks() * call.channels + at.channel : nullptr) {}
};

template <class T>
void forward_of(const RgLru call, const Place at) {
    const Constants own(call, at);
    Floats state{};
    if (call.initial)
        state = load(call.initial + own.place, at.count);
    for (int64_t chunk = 0, t = 0; chunk < call.chunks(); ++chunk) {
        if (own.kept)
            store(own.kept + chunk * call.channels, state, at.count);
        for (const int64_t end = call.chunk * (chunk + 1); t < end && t < call.steps; ++t) {
            state = advance<T>(call, at, t, state, own.rate);
            write<T>(call.y, at.of(call.y) + t * call.y.step, state, at.count);
        }
    }
    store(call.final + own.place, state, at.count);
}

template <class T>
void backward_of(const RgLru call, const Place at, float* states) {
    const Constants own(call, at);
    Floats gradient{}, d_rate{};
    if (call.dfinal)
        gradient = load(call.dfinal + own.place, at.count);
    for (int64_t chunk = call.chunks() - 1; chunk >= 0; --chunk) {
        const int64_t begin = chunk * call.chunk, left = call.steps - begin;
        const int64_t steps = left < call.chunk ? left : call.chunk;
        Floats state = load(own.kept + chunk * call.channels, at.count);
        for (int64_t t = 0; t < steps; ++t) {
            store(states + t * WIDTH, state);
            state = advance<T>(call, at, begin + t, state, own.rate);
        }
        Floats some_rate{};
        for (int64_t i = steps - 1; i >= 0; --i) {
            const int64_t t = begin + i;
            const Gates gates = gates_of<T>(call, at, t, own.rate);
            const Floats x = read<T>(call.x, at.of(call.x) + t * call.x.step, at.count);
            const Floats gated = gates.entering.value * x;
            gradient += read<T>(call.dy, at.of(call.dy) + t * call.dy.step, at.count);
            Floats scale = broadcast(1.0f), d_log{}, before{};
            if (!is_fresh(call, at, t)) {
                const Floats slope = 0.5f / gates.scale;
                const Floats steep = slope > STEEPEST ? broadcast(STEEPEST) : slope;
                scale = gates.scale;
                d_log = gradient * (gates.a * load(states + i * WIDTH) - 2.0f * gates.a * gates.a * steep * gated);
                before = gates.a * gradient;
            }
            const Floats scaled = gradient * scale;
            write<T>(call.dx, at.of(call.dx) + t * call.dx.step, scaled * gates.entering.value, at.count);
            write<T>(call.dinput_gate, at.of(call.dinput_gate) + t * call.dinput_gate.step,
                     scaled * x * gates.entering.derivative, at.count);
            write<T>(call.drecurrence_gate, at.of(call.drecurrence_gate) + t * call.drecurrence_gate.step,
                     -own.rate * gates.staying.derivative * d_log, at.count);
            some_rate -= gates.staying.value * d_log;
            gradient = before;
        }
        d_rate += some_rate;
    }
    store(call.dinitial + own.place, gradient, at.count);
    store(call.sums + own.place, d_rate * C * logistic(own.param).value, at.count);
}

void rg_lru_forward(const RgLru& call, int64_t first, int64_t last) {
    for_tasks(call.channels, first, last,
              [&](Place at) { call.narrow ? forward_of<BFloat16>(call, at) : forward_of<float>(call, at); });
}

void rg_lru_backward(const RgLru& call, float* scratch, int64_t first, int64_t last) {
    for_tasks(call.channels, first, last, [&](Place at) {
        call.narrow ? backward_of<BFloat16>(call, at, scratch) : backward_of<float>(call, at, scratch);
    });
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/rows.h"
#include "operators/rg_lru.h"

namespace tfm {

namespace {

// The gates of an element take as long as so many of the elements that `for_rows` counts.
constexpr int64_t WORK = 8;

// What both ways are told, by either's arguments.
template <class Arguments>
RgLru call_of(const Arguments& a, const Vector& param) {
    return {
        .param = matrix(param),
        .x = steps_of(a.x),
        .input_gate = steps_of(a.input_gate),
        .recurrence_gate = steps_of(a.recurrence_gate),
        .y = {},
        .dy = {},
        .dx = {},
        .dinput_gate = {},
        .drecurrence_gate = {},
        .reset = data_of<const bool>(a.reset),
        .reset_sequence = a.reset ? a.reset->stride(0) : 0,
        .reset_step = a.reset ? a.reset->stride(1) : 0,
        .initial = nullptr,
        .dfinal = nullptr,
        .final = nullptr,
        .dinitial = nullptr,
        .kept = nullptr,
        .sums = nullptr,
        .channels = a.x.size(2),
        .steps = a.x.size(1),
        .chunk = a.kept_every > 0 ? a.kept_every : std::max<int64_t>(1, a.x.size(1)),
        .narrow = is_narrow(width_of(a.x.scalar_type())),
    };
}

std::tuple<Tensor, Tensor, Tensor> rg_lru(const arguments::RgLru& a) {
    const Vector param(a.recurrent_param);
    const int64_t sequences = a.x.size(0);
    RgLru call = call_of(a, param);
    Tensor y = torch::stable::empty_like(a.x);
    Tensor final = empty({sequences, call.channels}, ScalarType::Float, a.x);
    const int64_t chunks = a.kept_every > 0 ? call.chunks() : 0;
    Tensor kept = empty({sequences * chunks * call.channels}, ScalarType::Float, a.x);
    call.y = steps_of(y);
    call.initial = data_of<const float>(a.initial_state);
    call.final = static_cast<float*>(final.data_ptr());
    call.kept = chunks ? static_cast<float*>(kept.data_ptr()) : nullptr;
    for_rows(sequences * channel_blocks(call.channels), WORK * LANES * call.steps,
             [&](int64_t begin, int64_t end) { TFM_RUN(rg_lru_forward, call, begin, end); });
    return {y, final, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rg_lru_backward(const arguments::RgLruBackward& a) {
    const Vector param(a.recurrent_param);
    const int64_t sequences = a.x.size(0);
    RgLru call = call_of(a, param);
    Tensor dx = torch::stable::empty_like(a.x), dparam = torch::stable::empty_like(a.recurrent_param);
    Tensor dinput_gate = torch::stable::empty_like(a.input_gate);
    Tensor drecurrence_gate = torch::stable::empty_like(a.recurrence_gate);
    Tensor dinitial = empty({sequences, call.channels}, ScalarType::Float, a.x);
    Tensor sums = empty({sequences, 1, call.channels}, ScalarType::Float, a.x);
    call.dy = steps_of(a.dy);
    call.dx = steps_of(dx);
    call.dinput_gate = steps_of(dinput_gate);
    call.drecurrence_gate = steps_of(drecurrence_gate);
    call.dfinal = data_of<const float>(a.dfinal_state);
    call.dinitial = static_cast<float*>(dinitial.data_ptr());
    call.kept = static_cast<float*>(a.kept.data_ptr());
    call.sums = static_cast<float*>(sums.data_ptr());
    for_rows(sequences * channel_blocks(call.channels), 2 * WORK * LANES * call.steps, [&](int64_t begin, int64_t end) {
        const Scratch scratch(call.chunk, LANES);
        TFM_RUN(rg_lru_backward, call, scratch.memory.get(), begin, end);
    });
    sum_blocks(sums, {dparam});
    return {dx, dinput_gate, drecurrence_gate, dparam, dinitial};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::RgLru, rg_lru>(m);
    implement<arguments::RgLruBackward, rg_lru_backward>(m);
}

} // namespace tfm

#endif
