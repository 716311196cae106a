// Mamba's selective scan: the formulas of kernels/selective_scan.py.
//
// A vector holds as many channels as it has lanes, and has N vectors of state. A task is a group of channels of one
// sequence, which go through a chunk of steps one vector after the other: what they read of B and C is then at hand,
// and what the backward sums over channels is summed lane by lane over the group before any lanes are summed. Its parts
// are added up over groups, and those of A, D and the bias over sequences, afterwards and in their order.
#include "cpu/isa.h"

#include "cpu/activations.h"
#include "cpu/sequences.h"

namespace tfm {

// Channels of a task.
constexpr int64_t GROUP = 64;

struct SelectiveScan {
    Matrix rate, skip, bias;  // A: [D, N]; D and delta_bias: [D], or absent
    Sequences x, delta, gate; // gate: z, or absent
    Sequences enters, seen;   // B and C, whose channels are the numbers of a state
    Sequences y, dy, dx, ddelta, dgate, denters, dseen;
    const float *initial, *dfinal; // states: [B, D, N]; null: absent
    float *final, *dinitial;
    float* kept;   // [B, chunks, N, D], the states before each chunk of steps; null: they are not kept
    float* sums;   // [B, N + 2, D]: the gradients of A, D and the bias
    float* shared; // [groups, B, S, 2 N]: of B and C
    int64_t sequences, channels, states, steps, chunk;
    bool narrow;

    // One even where there is no step: the state before the first is kept.
    int64_t chunks() const { return steps == 0 ? 1 : (steps + chunk - 1) / chunk; }
    int64_t groups() const { return (channels + GROUP - 1) / GROUP; }
};

// Numbers of memory that a task needs.
static inline int64_t forward_scratch(const SelectiveScan& call) {
    return 2 * call.states * (GROUP + call.chunk + LANES);
}
static inline int64_t backward_scratch(const SelectiveScan& call) {
    return forward_scratch(call) + 4 * call.states * call.chunk * LANES;
}

// Tasks: a group of channels of a sequence each; of the last, a step of a sequence.
TFM_KERNEL(selective_scan_forward, const SelectiveScan& call, float* scratch, int64_t first, int64_t last)
TFM_KERNEL(selective_scan_backward, const SelectiveScan& call, float* scratch, int64_t first, int64_t last)
TFM_KERNEL(selective_scan_sum, const SelectiveScan& call, int64_t first, int64_t last)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

// The numbers of a few channels, of which each has its N side by side, as a vector for each of the N.
TFM_INLINE void load_states(const Matrix& from, int64_t channel, int64_t count, int64_t states, float* to) {
    for (int64_t n = 0; n < states * WIDTH; n += WIDTH)
        store(to + n, Floats{});
    for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t n = 0; n < states; ++n)
            to[n * WIDTH + lane] = get(from, (channel + lane) * states + n, 1)[0];
}

TFM_INLINE void store_states(float* to, int64_t count, int64_t states, const float* from) {
    for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t n = 0; n < states; ++n)
            to[lane * states + n] = from[n * WIDTH + lane];
}

// What a task has: its channels, and its part of the scratch memory.
struct Task {
    int64_t sequence, first, last;   // channels
    float *rates, *running;          // [channels of the group / WIDTH, N, WIDTH]
    float* given;                    // [chunk, 2 N], B and C of each step
    float *before, *decays, *shared; // [chunk, N, WIDTH] twice, and with 2 N

    Task(const SelectiveScan& call, int64_t task, float* scratch)
        : sequence(task / call.groups()), first(task % call.groups() * GROUP),
          last(first + GROUP < call.channels ? first + GROUP : call.channels), rates(scratch),
          running(rates + call.states * GROUP), given(running + call.states * GROUP),
          before(given + 2 * call.states * (call.chunk + LANES)), decays(before + call.states * call.chunk * LANES),
          shared(decays + call.states * call.chunk * LANES) {}

    float* of_vector(float* of_group, int64_t channel, int64_t states) const {
        return of_group + (channel - first) * states;
    }
};

// Runs over the vectors of a task's channels.
template <class Kernel>
TFM_INLINE void for_channels(const Task& task, const Kernel& kernel) {
    for (int64_t channel = task.first; channel < task.last; channel += WIDTH) {
        const int64_t left = task.last - channel;
        kernel(Place{task.sequence, channel, left < WIDTH ? left : WIDTH});
    }
}

template <class T>
TFM_INLINE Floats at_step(const Sequences& from, const Place& at, int64_t t) {
    return read<T>(from, at.of(from) + t * from.step, at.count);
}

template <class T>
TFM_INLINE void set_step(const Sequences& to, const Place& at, int64_t t, Floats value) {
    write<T>(to, at.of(to) + t * to.step, value, at.count);
}

// B and C of a chunk's steps, in fp32 side by side.
template <class T>
TFM_INLINE void gather(const SelectiveScan& call, const Task& task, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        float* const to = task.given + (t - begin) * 2 * call.states;
        for (int64_t n = 0; n < call.states; n += WIDTH) {
            const int64_t left = call.states - n;
            const Place at{task.sequence, n, left < WIDTH ? left : WIDTH};
            store(to + n, at_step<T>(call.enters, at, t), at.count);
            store(to + call.states + n, at_step<T>(call.seen, at, t), at.count);
        }
    }
}

// What a step makes of its size before the bias.
struct Step {
    Floats x, size, raw; // Δ, and what it is the softplus of
};

template <class T>
TFM_INLINE Step step_of(const SelectiveScan& call, const Place& at, int64_t t, Floats bias) {
    const Floats raw = at_step<T>(call.delta, at, t) + bias;
    return {at_step<T>(call.x, at, t), softplus(raw), raw};
}

TFM_INLINE Floats vector_of(const Matrix& m, const Place& at) {
    return m.data ? get(m, at.channel, at.count) : Floats{};
}

template <class T>
void forward_of(const SelectiveScan& call, const Task task) {
    const int64_t states = call.states;
    for_channels(task, [&](Place at) {
        float* const state = task.of_vector(task.running, at.channel, states);
        load_states(call.rate, at.channel, at.count, states, task.of_vector(task.rates, at.channel, states));
        const Matrix initial{const_cast<float*>(call.initial), false, 0};
        load_states(initial, at.sequence * call.channels + at.channel, call.initial ? at.count : 0, states, state);
    });
    for (int64_t chunk = 0; chunk < call.chunks(); ++chunk) {
        const int64_t begin = chunk * call.chunk;
        const int64_t end = begin + call.chunk < call.steps ? begin + call.chunk : call.steps;
        gather<T>(call, task, begin, end);
        for_channels(task, [&](Place at) {
            const float* const rates = task.of_vector(task.rates, at.channel, states);
            float* const state = task.of_vector(task.running, at.channel, states);
            const Floats bias = vector_of(call.bias, at), skip = vector_of(call.skip, at);
            if (call.kept) {
                float* const kept =
                    call.kept + (at.sequence * call.chunks() + chunk) * states * call.channels + at.channel;
                for (int64_t n = 0; n < states; ++n)
                    store(kept + n * call.channels, load(state + n * WIDTH), at.count);
            }
            for (int64_t t = begin; t < end; ++t) {
                const float* const enters = task.given + (t - begin) * 2 * states;
                const float* const seen = enters + states;
                const Step step = step_of<T>(call, at, t, bias);
                const Floats entering = step.size * step.x;
                Floats y = skip * step.x;
                for (int64_t n = 0; n < states; ++n) {
                    const Floats decay = exp(step.size * load(rates + n * WIDTH));
                    const Floats next = decay * load(state + n * WIDTH) + entering * enters[n];
                    store(state + n * WIDTH, next);
                    y += next * seen[n];
                }
                if (call.gate.data)
                    y *= activate<Activation::SILU>(at_step<T>(call.gate, at, t)).value;
                set_step<T>(call.y, at, t, y);
            }
        });
    }
    for_channels(task, [&](Place at) {
        store_states(call.final + (at.sequence * call.channels + at.channel) * states, at.count, states,
                     task.of_vector(task.running, at.channel, states));
    });
}

// The states before each step of a chunk, and how much of each stays.
template <class T>
TFM_INLINE void states_of(const SelectiveScan& call, const Task& task, const Place& at, int64_t chunk, int64_t begin,
                          int64_t end, Floats bias) {
    const int64_t states = call.states;
    const float* const rates = task.of_vector(task.rates, at.channel, states);
    const float* const kept = call.kept + (at.sequence * call.chunks() + chunk) * states * call.channels + at.channel;
    for (int64_t n = 0; n < states; ++n)
        store(task.before + n * WIDTH, load(kept + n * call.channels, at.count));
    for (int64_t t = begin; t < end; ++t) {
        const int64_t place = (t - begin) * states * WIDTH;
        const float* const enters = task.given + (t - begin) * 2 * states;
        const Step step = step_of<T>(call, at, t, bias);
        const Floats entering = step.size * step.x;
        for (int64_t n = 0; n < states; ++n) {
            const Floats decay = exp(step.size * load(rates + n * WIDTH));
            store(task.decays + place + n * WIDTH, decay);
            if (t + 1 < end)
                store(task.before + place + (states + n) * WIDTH,
                      decay * load(task.before + place + n * WIDTH) + entering * enters[n]);
        }
    }
}

// Sums `value` into what was summed before, or begins with it.
TFM_INLINE void accumulate(float* to, Floats value, int64_t count, bool begins) {
    store(to, begins ? value : load(to, count) + value, count);
}

template <class T>
TFM_INLINE void backward_of_chunk(const SelectiveScan& call, const Task& task, const Place& at, int64_t chunk,
                                  int64_t begin, int64_t end) {
    const int64_t states = call.states;
    const float* const rates = task.of_vector(task.rates, at.channel, states);
    float* const gradient = task.of_vector(task.running, at.channel, states);
    const Floats bias = vector_of(call.bias, at), skip = vector_of(call.skip, at);
    states_of<T>(call, task, at, chunk, begin, end, bias);
    float* const sums = call.sums + at.sequence * (states + 2) * call.channels + at.channel;
    const bool begins = chunk == call.chunks() - 1;
    if (begins)
        for (int64_t n = 0; n < states; ++n)
            store(sums + n * call.channels, Floats{}, at.count);
    Floats d_skip{}, d_bias{};
    for (int64_t t = end - 1; t >= begin; --t) {
        const float* const enters = task.given + (t - begin) * 2 * states;
        const float* const seen = enters + states;
        const float* const before = task.before + (t - begin) * states * WIDTH;
        const float* const decays = task.decays + (t - begin) * states * WIDTH;
        float* const shared = task.shared + (t - begin) * 2 * states * WIDTH;
        const Step step = step_of<T>(call, at, t, bias);
        const Floats entering = step.size * step.x, dy = at_step<T>(call.dy, at, t);
        Activated gate{broadcast(1.0f), Floats{}};
        if (call.gate.data)
            gate = activate<Activation::SILU>(at_step<T>(call.gate, at, t));
        const Floats d_seen = dy * gate.value;
        Floats y = skip * step.x, d_entering{}, d_size{};
        for (int64_t n = 0; n < states; ++n) {
            const Floats old = load(before + n * WIDTH), decay = load(decays + n * WIDTH), kept = decay * old;
            const Floats state = kept + entering * enters[n];
            const Floats g = load(gradient + n * WIDTH) + d_seen * seen[n];
            y += state * seen[n];
            d_entering += g * enters[n];
            const Floats d_exponent = g * kept;
            d_size += d_exponent * load(rates + n * WIDTH);
            float* const d_rate = sums + n * call.channels;
            store(d_rate, load(d_rate, at.count) + d_exponent * step.size, at.count);
            accumulate(shared + n * WIDTH, g * entering, WIDTH, at.channel == task.first);
            accumulate(shared + (states + n) * WIDTH, state * d_seen, WIDTH, at.channel == task.first);
            store(gradient + n * WIDTH, g * decay);
        }
        const Floats d_raw = (d_size + d_entering * step.x) * logistic(step.raw).value;
        set_step<T>(call.dx, at, t, d_entering * step.size + skip * d_seen);
        set_step<T>(call.ddelta, at, t, d_raw);
        if (call.gate.data)
            set_step<T>(call.dgate, at, t, dy * y * gate.derivative);
        d_skip += d_seen * step.x;
        d_bias += d_raw;
    }
    accumulate(sums + states * call.channels, d_skip, at.count, begins);
    accumulate(sums + (states + 1) * call.channels, d_bias, at.count, begins);
}

template <class T>
void backward_of(const SelectiveScan& call, const Task task) {
    const int64_t states = call.states, group = task.first / GROUP;
    for_channels(task, [&](Place at) {
        load_states(call.rate, at.channel, at.count, states, task.of_vector(task.rates, at.channel, states));
        const Matrix dfinal{const_cast<float*>(call.dfinal), false, 0};
        load_states(dfinal, at.sequence * call.channels + at.channel, call.dfinal ? at.count : 0, states,
                    task.of_vector(task.running, at.channel, states));
    });
    for (int64_t chunk = call.chunks() - 1; chunk >= 0; --chunk) {
        const int64_t begin = chunk * call.chunk;
        const int64_t end = begin + call.chunk < call.steps ? begin + call.chunk : call.steps;
        gather<T>(call, task, begin, end);
        for_channels(task, [&](Place at) { backward_of_chunk<T>(call, task, at, chunk, begin, end); });
        float* const to = call.shared + ((group * call.sequences + task.sequence) * call.steps + begin) * 2 * states;
        for (int64_t i = 0; i < (end - begin) * 2 * states; ++i)
            to[i] = sum(load(task.shared + i * WIDTH));
    }
    for_channels(task, [&](Place at) {
        store_states(call.dinitial + (at.sequence * call.channels + at.channel) * states, at.count, states,
                     task.of_vector(task.running, at.channel, states));
    });
}

template <class T>
void sum_of(const SelectiveScan& call, int64_t row) {
    const int64_t apart = call.sequences * call.steps * 2 * call.states;
    const float* const from = call.shared + row * 2 * call.states;
    for (int64_t n = 0; n < call.states; n += WIDTH) {
        const int64_t left = call.states - n;
        const Place at{row / call.steps, n, left < WIDTH ? left : WIDTH};
        Floats enters{}, seen{};
        for (int64_t group = 0; group < call.groups(); ++group) {
            enters += load(from + group * apart + n, at.count);
            seen += load(from + group * apart + call.states + n, at.count);
        }
        set_step<T>(call.denters, at, row % call.steps, enters);
        set_step<T>(call.dseen, at, row % call.steps, seen);
    }
}

void selective_scan_forward(const SelectiveScan& call, float* scratch, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task)
        call.narrow ? forward_of<BFloat16>(call, Task(call, task, scratch))
                    : forward_of<float>(call, Task(call, task, scratch));
}

void selective_scan_backward(const SelectiveScan& call, float* scratch, int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task)
        call.narrow ? backward_of<BFloat16>(call, Task(call, task, scratch))
                    : backward_of<float>(call, Task(call, task, scratch));
}

void selective_scan_sum(const SelectiveScan& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
        call.narrow ? sum_of<BFloat16>(call, row) : sum_of<float>(call, row);
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/rows.h"
#include "operators/selective_scan.h"

namespace tfm {

namespace {

// A number of a state takes as long as so many of the elements that `for_rows` counts.
constexpr int64_t WORK = 2;

Sequences maybe_steps_of(const MaybeTensor& x) { return x ? steps_of(*x) : Sequences{}; }

// What both ways are told, by either's arguments.
template <class Arguments>
SelectiveScan call_of(const Arguments& a, const Vector& skip, const Vector& bias) {
    SelectiveScan call{};
    call.rate = {a.A.data_ptr(), is_narrow(width_of(a.A.scalar_type())), 0};
    call.skip = matrix(skip);
    call.bias = matrix(bias);
    call.x = steps_of(a.x);
    call.delta = steps_of(a.delta);
    call.gate = maybe_steps_of(a.z);
    call.enters = steps_of(a.B);
    call.seen = steps_of(a.C);
    call.sequences = a.x.size(0);
    call.channels = a.x.size(2);
    call.states = a.A.size(1);
    call.steps = a.x.size(1);
    // Where no states are kept, as long as what it reads of B and C stays near.
    call.chunk = a.kept_every > 0 ? a.kept_every : 16;
    call.narrow = is_narrow(width_of(a.x.scalar_type()));
    return call;
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const arguments::SelectiveScan& a) {
    const Vector skip(a.D), bias(a.delta_bias);
    SelectiveScan call = call_of(a, skip, bias);
    Tensor y = torch::stable::empty_like(a.x);
    Tensor final = empty({call.sequences, call.channels, call.states}, ScalarType::Float, a.x);
    const int64_t chunks = a.kept_every > 0 ? call.chunks() : 0;
    Tensor kept = empty({call.sequences * chunks * call.channels * call.states}, ScalarType::Float, a.x);
    call.y = steps_of(y);
    call.initial = data_of<const float>(a.initial_state);
    call.final = static_cast<float*>(final.data_ptr());
    call.kept = chunks ? static_cast<float*>(kept.data_ptr()) : nullptr;
    for_rows(call.sequences * call.groups(), WORK * GROUP * call.states * call.steps, [&](int64_t begin, int64_t end) {
        const Scratch scratch(1, forward_scratch(call));
        TFM_RUN(selective_scan_forward, call, scratch.memory.get(), begin, end);
    });
    return {y, final, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, MaybeTensor, Tensor, Tensor>
selective_scan_backward(const arguments::SelectiveScanBackward& a) {
    const Vector skip(a.D), bias(a.delta_bias);
    SelectiveScan call = call_of(a, skip, bias);
    Tensor dx = torch::stable::empty_like(a.x), ddelta = torch::stable::empty_like(a.delta);
    Tensor dB = torch::stable::empty_like(a.B), dC = torch::stable::empty_like(a.C);
    MaybeTensor dz;
    if (a.z)
        dz = torch::stable::empty_like(*a.z);
    const int64_t parameters = (call.states + 2) * call.channels;
    Tensor dparameters = empty({parameters}, ScalarType::Float, a.x);
    Tensor dinitial = empty({call.sequences, call.channels, call.states}, ScalarType::Float, a.x);
    Tensor sums = empty({call.sequences, 1, parameters}, ScalarType::Float, a.x);
    Tensor shared = empty({call.groups() * call.sequences * call.steps * 2 * call.states}, ScalarType::Float, a.x);
    call.dy = steps_of(a.dy);
    call.dx = steps_of(dx);
    call.ddelta = steps_of(ddelta);
    call.dgate = maybe_steps_of(dz);
    call.denters = steps_of(dB);
    call.dseen = steps_of(dC);
    call.dfinal = data_of<const float>(a.dfinal_state);
    call.dinitial = static_cast<float*>(dinitial.data_ptr());
    call.kept = static_cast<float*>(a.kept.data_ptr());
    call.sums = static_cast<float*>(sums.data_ptr());
    call.shared = static_cast<float*>(shared.data_ptr());
    for_rows(call.sequences * call.groups(), 2 * WORK * GROUP * call.states * call.steps,
             [&](int64_t begin, int64_t end) {
                 const Scratch scratch(1, backward_scratch(call));
                 TFM_RUN(selective_scan_backward, call, scratch.memory.get(), begin, end);
             });
    for_rows(call.sequences * call.steps, 2 * call.states * call.groups(),
             [&](int64_t begin, int64_t end) { TFM_RUN(selective_scan_sum, call, begin, end); });
    sum_blocks(sums, {dparameters});
    return {dx, ddelta, dB, dC, dz, dparameters, dinitial};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::SelectiveScan, selective_scan>(m);
    implement<arguments::SelectiveScanBackward, selective_scan_backward>(m);
}

} // namespace tfm

#endif
