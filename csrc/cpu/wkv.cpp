// RWKV's attention by exponential decay: the formulas of kernels/wkv.py.
//
// A vector holds as many channels as it has lanes, and its state stays in registers from step to step. Every block of
// channels of every sequence is a task of its own, both ways; what the backward sums over steps is added up over the
// sequences afterwards, in their order. Exponentials do not wait for one another: the maximum alone, an addition and a
// comparison a step, is known before them.
#include "cpu/isa.h"

#include "cpu/sequences.h"

namespace tfm {

struct Wkv {
    Matrix decay, first; // [D]
    Sequences key, value, y, dy, dkey, dvalue;
    const float *initial, *dfinal; // states: [3, B, D]; null: absent
    float *final, *dinitial;
    float* kept; // [B, chunks, 3, D], the states before each chunk of steps; null: they are not kept
    float* sums; // [B, 2, D]: the gradients of decay and first
    int64_t sequences, channels, steps, chunk;
    bool narrow;

    // One even where there is no step: the state before the first is kept.
    int64_t chunks() const { return steps == 0 ? 1 : (steps + chunk - 1) / chunk; }
};

// Vectors of LANES channels: the states of a chunk.
static inline int64_t scratch_rows(const Wkv& call) { return 3 * call.chunk; }

// Tasks: a block of channels of a sequence each.
TFM_KERNEL(wkv_forward, const Wkv& call, int64_t first, int64_t last)
TFM_KERNEL(wkv_backward, const Wkv& call, float* scratch, int64_t first, int64_t last)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

// The exponent of a state that holds nothing.
constexpr float NOTHING = -1e38f;

// What it sums is e^maximum times numerator and denominator.
struct State {
    Floats numerator, denominator, maximum;
};

// Three numbers of a few channels, which lie so far apart.
TFM_INLINE State load_state(const float* from, int64_t apart, int64_t count) {
    return {load(from, count), load(from + apart, count), load(from + 2 * apart, count)};
}

TFM_INLINE void store_state(float* to, int64_t apart, int64_t count, const State& state) {
    store(to, state.numerator, count);
    store(to + apart, state.denominator, count);
    store(to + 2 * apart, state.maximum, count);
}

// The weights of two exponents, relative to the larger.
struct Shares {
    Floats before, now;
};

TFM_INLINE Shares shares(Floats difference) {
    const Floats smaller = exp(-absolute(difference)), one = broadcast(1.0f);
    return {difference >= 0.0f ? one : smaller, difference >= 0.0f ? smaller : one};
}

// One channel's numbers at one step.
struct Step {
    Floats key, value;
};

template <class T>
TFM_INLINE Step step_of(const Wkv& call, const Place& at, int64_t t) {
    return {read<T>(call.key, at.of(call.key) + t * call.key.step, at.count),
            read<T>(call.value, at.of(call.value) + t * call.value.step, at.count)};
}

struct Average {
    Floats y, inverse; // of the denominator
    Shares weights;
};

TFM_INLINE Average average(const State& state, const Step& step, Floats first) {
    const Shares weights = shares(state.maximum - (first + step.key));
    const Floats inverse = 1.0f / (weights.before * state.denominator + weights.now);
    return {(weights.before * state.numerator + weights.now * step.value) * inverse, inverse, weights};
}

TFM_INLINE State advance(const State& state, const Step& step, Floats rate) {
    const Floats decayed = state.maximum + rate;
    const Shares weights = shares(decayed - step.key);
    return {weights.before * state.numerator + weights.now * step.value,
            weights.before * state.denominator + weights.now, maximum(decayed, step.key)};
}

// What the channels of a place have throughout.
struct Constants {
    Floats rate, first;
    int64_t place, apart; // of a state
    float* kept;

    Constants(const Wkv& call, const Place& at)
        : rate(-exp(get(call.decay, at.channel, at.count))), first(get(call.first, at.channel, at.count)),
          place(at.sequence * call.channels + at.channel), apart(call.sequences * call.channels),
          kept(call.kept ? call.kept + at.sequence * call.chunks() * 3 * call.channels + at.channel : nullptr) {}
};

template <class T>
void forward_of(const Wkv call, const Place at) {
    const Constants own(call, at);
    State state = {Floats{}, Floats{}, broadcast(NOTHING)};
    if (call.initial)
        state = load_state(call.initial + own.place, own.apart, at.count);
    for (int64_t chunk = 0, t = 0; chunk < call.chunks(); ++chunk) {
        if (own.kept)
            store_state(own.kept + chunk * 3 * call.channels, call.channels, at.count, state);
        for (const int64_t end = call.chunk * (chunk + 1); t < end && t < call.steps; ++t) {
            const Step step = step_of<T>(call, at, t);
            write<T>(call.y, at.of(call.y) + t * call.y.step, average(state, step, own.first).y, at.count);
            state = advance(state, step, own.rate);
        }
    }
    store_state(call.final + own.place, own.apart, at.count, state);
}

template <class T>
void backward_of(const Wkv call, const Place at, float* states) {
    const Constants own(call, at);
    State gradient = {Floats{}, Floats{}, Floats{}};
    if (call.dfinal)
        gradient = load_state(call.dfinal + own.place, own.apart, at.count);
    Floats d_rate{}, d_first{};
    for (int64_t chunk = call.chunks() - 1; chunk >= 0; --chunk) {
        const int64_t begin = chunk * call.chunk, left = call.steps - begin;
        const int64_t steps = left < call.chunk ? left : call.chunk;
        State state = load_state(own.kept + chunk * 3 * call.channels, call.channels, at.count);
        for (int64_t t = 0; t < steps; ++t) {
            store_state(states + 3 * t * WIDTH, WIDTH, WIDTH, state);
            state = advance(state, step_of<T>(call, at, begin + t), own.rate);
        }
        Floats some_rate{}, some_first{};
        for (int64_t t = steps - 1; t >= 0; --t) {
            state = load_state(states + 3 * t * WIDTH, WIDTH, WIDTH);
            const Step step = step_of<T>(call, at, begin + t);
            const Floats decayed = state.maximum + own.rate, offset = own.first + step.key;
            const Shares weights = shares(decayed - step.key);
            const Floats of_state =
                weights.before * (state.numerator * gradient.numerator + state.denominator * gradient.denominator);
            const Floats of_step = weights.now * (step.value * gradient.numerator + gradient.denominator);
            const Floats d_decayed = decayed >= step.key ? gradient.maximum - of_step : of_state;
            const Floats d_key = decayed >= step.key ? of_step : gradient.maximum - of_state;
            const Average found = average(state, step, own.first);
            const Floats d_y = read<T>(call.dy, at.of(call.dy) + (begin + t) * call.dy.step, at.count);
            const Floats d_sum = d_y * found.inverse, d_before = found.weights.before * d_sum;
            const Floats d_now = found.weights.now * d_sum;
            const Floats d_offset = state.maximum >= offset
                                        ? d_now * (step.value - found.y)
                                        : d_before * (state.denominator * found.y - state.numerator);
            write<T>(call.dkey, at.of(call.dkey) + (begin + t) * call.dkey.step, d_key + d_offset, at.count);
            write<T>(call.dvalue, at.of(call.dvalue) + (begin + t) * call.dvalue.step,
                     weights.now * gradient.numerator + d_now, at.count);
            some_rate += d_decayed;
            some_first += d_offset;
            gradient = {weights.before * gradient.numerator + d_before,
                        weights.before * gradient.denominator - d_before * found.y, d_decayed - d_offset};
        }
        d_rate += some_rate;
        d_first += some_first;
    }
    store_state(call.dinitial + own.place, own.apart, at.count, gradient);
    float* const sums = call.sums + at.sequence * 2 * call.channels + at.channel;
    store(sums, d_rate * own.rate, at.count);
    store(sums + call.channels, d_first, at.count);
}

void wkv_forward(const Wkv& call, int64_t first, int64_t last) {
    for_tasks(call.channels, first, last,
              [&](Place at) { call.narrow ? forward_of<BFloat16>(call, at) : forward_of<float>(call, at); });
}

void wkv_backward(const Wkv& call, float* scratch, int64_t first, int64_t last) {
    for_tasks(call.channels, first, last, [&](Place at) {
        call.narrow ? backward_of<BFloat16>(call, at, scratch) : backward_of<float>(call, at, scratch);
    });
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/rows.h"
#include "operators/wkv.h"

namespace tfm {

namespace {

// An exponential takes as long as so many of the elements that `for_rows` counts.
constexpr int64_t WORK = 4;

// What both ways are told, by either's arguments.
template <class Arguments>
Wkv call_of(const Arguments& a, const Vector& decay, const Vector& first) {
    return {
        .decay = matrix(decay),
        .first = matrix(first),
        .key = steps_of(a.key),
        .value = steps_of(a.value),
        .y = {},
        .dy = {},
        .dkey = {},
        .dvalue = {},
        .initial = nullptr,
        .dfinal = nullptr,
        .final = nullptr,
        .dinitial = nullptr,
        .kept = nullptr,
        .sums = nullptr,
        .sequences = a.key.size(0),
        .channels = a.key.size(2),
        .steps = a.key.size(1),
        .chunk = a.kept_every > 0 ? a.kept_every : std::max<int64_t>(1, a.key.size(1)),
        .narrow = is_narrow(width_of(a.key.scalar_type())),
    };
}

std::tuple<Tensor, Tensor, Tensor> wkv(const arguments::Wkv& a) {
    const Vector decay(a.decay), first(a.first);
    Wkv call = call_of(a, decay, first);
    Tensor y = torch::stable::empty_like(a.key);
    Tensor final = empty({3, call.sequences, call.channels}, ScalarType::Float, a.key);
    const int64_t chunks = a.kept_every > 0 ? call.chunks() : 0;
    Tensor kept = empty({call.sequences * chunks * 3 * call.channels}, ScalarType::Float, a.key);
    call.y = steps_of(y);
    call.initial = data_of<const float>(a.initial_state);
    call.final = static_cast<float*>(final.data_ptr());
    call.kept = chunks ? static_cast<float*>(kept.data_ptr()) : nullptr;
    for_rows(call.sequences * channel_blocks(call.channels), WORK * LANES * call.steps,
             [&](int64_t begin, int64_t end) { TFM_RUN(wkv_forward, call, begin, end); });
    return {y, final, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv_backward(const arguments::WkvBackward& a) {
    const Vector decay(a.decay), first(a.first);
    Wkv call = call_of(a, decay, first);
    Tensor ddecay = torch::stable::empty_like(a.decay), dfirst = torch::stable::empty_like(a.first);
    Tensor dkey = torch::stable::empty_like(a.key), dvalue = torch::stable::empty_like(a.value);
    Tensor dinitial = empty({3, call.sequences, call.channels}, ScalarType::Float, a.key);
    Tensor sums = empty({call.sequences, 2, call.channels}, ScalarType::Float, a.key);
    call.dy = steps_of(a.dy);
    call.dkey = steps_of(dkey);
    call.dvalue = steps_of(dvalue);
    call.dfinal = data_of<const float>(a.dfinal_state);
    call.dinitial = static_cast<float*>(dinitial.data_ptr());
    call.kept = static_cast<float*>(a.kept.data_ptr());
    call.sums = static_cast<float*>(sums.data_ptr());
    for_rows(call.sequences * channel_blocks(call.channels), 2 * WORK * LANES * call.steps,
             [&](int64_t begin, int64_t end) {
                 const Scratch scratch(scratch_rows(call), LANES);
                 TFM_RUN(wkv_backward, call, scratch.memory.get(), begin, end);
             });
    sum_blocks(sums, {ddecay, dfirst});
    return {ddecay, dfirst, dkey, dvalue, dinitial};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::Wkv, wkv>(m);
    implement<arguments::WkvBackward, wkv_backward>(m);
}

} // namespace tfm

#endif
