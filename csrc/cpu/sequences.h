// Sequences of steps, each of many channels, as the CPU kernels see them; where TFM_ISA is defined, a vector of
// channels at a time, as fp32.
#pragma once

#include "cpu/matrix.h"

namespace tfm {

// How many numbers lie between neighbours.
struct Sequences {
    void* data; // null: absent
    int64_t sequence, channel, step;
};

// Blocks of LANES channels, the last of which may be part.
static inline int64_t channel_blocks(int64_t channels) { return padded(channels) / LANES; }

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

// `count` channels at one place, a step of one sequence.
template <class T>
TFM_INLINE Floats read(const Sequences& from, int64_t place, int64_t count) {
    const T* const data = static_cast<const T*>(from.data) + place;
    if (from.channel == 1)
        return load(data, count);
    float values[WIDTH] = {};
    for (int64_t lane = 0; lane < count; ++lane)
        values[lane] = load(data + lane * from.channel, 1)[0];
    return load(values);
}

template <class T>
TFM_INLINE void write(const Sequences& to, int64_t place, Floats value, int64_t count) {
    T* const data = static_cast<T*>(to.data) + place;
    if (to.channel == 1) {
        store(data, value, count);
        return;
    }
    T values[WIDTH];
    store(values, value);
    for (int64_t lane = 0; lane < count; ++lane)
        data[lane * to.channel] = values[lane];
}

// A few channels of one sequence.
struct Place {
    int64_t sequence, channel, count;

    int64_t of(const Sequences& x) const { return sequence * x.sequence + channel * x.channel; }
};

// kernel(place) for each vector of a block of LANES channels.
template <class Kernel>
TFM_INLINE void for_vectors(int64_t channels, int64_t sequence, int64_t block, const Kernel& kernel) {
    for (int64_t channel = block * LANES; channel < (block + 1) * LANES && channel < channels; channel += WIDTH) {
        const int64_t left = channels - channel;
        kernel(Place{sequence, channel, left < WIDTH ? left : WIDTH});
    }
}

// The same for tasks of a block of a sequence each.
template <class Kernel>
TFM_INLINE void for_tasks(int64_t channels, int64_t first, int64_t last, const Kernel& kernel) {
    const int64_t blocks = channel_blocks(channels);
    for (int64_t task = first; task < last; ++task)
        for_vectors(channels, task / blocks, task % blocks, kernel);
}

} // namespace tfm::TFM_ISA

#else

#include "common/tensor.h"

namespace tfm {

// Of [B, S, D].
inline Sequences steps_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(1)}; }

} // namespace tfm

#endif
