// Cross-entropy of rows of logits, and its gradient over them or beside: the formulas of
// kernels/cross_entropy/stored.py.
//
// A row goes through three short passes while it lies in the nearest caches. The first forms z, in fp32, and its
// maximum: where the gradient will be if that is fp32, in a scratch row if it is bf16 or not wanted. The second leaves
// exp(z - maximum) there and sums it, so that the third, which writes the gradient, needs no exponential. Only softcap
// does, whose slope is read from z. Rows are shared among threads, and none depends on another.
#include "cpu/isa.h"

#include "cpu/matrix.h"

namespace tfm {

struct CrossEntropy {
    Matrix logits, gradient; // gradient: null where not wanted; may be the logits
    const float* bias;       // null: none
    const int64_t* target;
    float* losses;        // null: not wanted
    const float* grad;    // of the losses; null: 1
    const float* divisor; // of their gradients; null: 1
    int64_t classes, ignore_index;
    float smoothing, z_loss;
    float softcap; // 0: none
};

// `scratch`: a row of fp32 where the logits are bf16, or no gradient is wanted.
TFM_KERNEL(cross_entropy, const CrossEntropy& call, float* scratch, int64_t first_row, int64_t last_row)

} // namespace tfm

#ifdef TFM_ISA

namespace tfm::TFM_ISA {

// visit(column, count, slot) for every vector of a row, the last one cut to what is left. Neighbours have different
// slots, 0 to 3: four sums side by side, so that none waits for the one before.
template <class Visit>
TFM_INLINE void for_vectors(int64_t columns, Visit visit) {
    int64_t column = 0;
    for (; column + 4 * WIDTH <= columns; column += 4 * WIDTH) {
        visit(column, WIDTH, 0);
        visit(column + WIDTH, WIDTH, 1);
        visit(column + 2 * WIDTH, WIDTH, 2);
        visit(column + 3 * WIDTH, WIDTH, 3);
    }
    for (; column < columns; column += WIDTH)
        visit(column, columns - column, 0);
}

#define TFM_VISIT(column, count, slot) [&](int64_t column, int64_t count, int slot) __attribute__((always_inline))

// Writes z, where it STORES, and returns the largest.
template <class T, bool BIASED, bool CAPPED, bool STORES>
TFM_INLINE float form(const CrossEntropy& call, const T* logits, float* z) {
    const float inverse = CAPPED ? 1.0f / call.softcap : 0.0f;
    const Floats lowest = broadcast(-__builtin_inff());
    Floats highest[4] = {lowest, lowest, lowest, lowest};
    for_vectors(
        call.classes, TFM_VISIT(column, count, slot) {
            Floats value = load(logits + column, count);
            if (BIASED)
                value += load(call.bias + column, count);
            if (CAPPED)
                value = call.softcap * tanh(value * inverse);
            if (STORES)
                store(z + column, value, count);
            if (count < WIDTH)
                value = lanes() < static_cast<int32_t>(count) ? value : lowest;
            highest[slot] = maximum(value, highest[slot]);
        });
    return maximum(maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3])));
}

template <class T>
TFM_INLINE float form(const CrossEntropy& call, const T* logits, float* z) {
    if (call.softcap != 0.0f)
        return call.bias ? form<T, true, true, true>(call, logits, z) : form<T, false, true, true>(call, logits, z);
    if (call.bias)
        return form<T, true, false, true>(call, logits, z);
    return static_cast<const void*>(z) == logits ? form<T, false, false, false>(call, logits, z)
                                                 : form<T, false, false, true>(call, logits, z);
}

// Where z of a row is formed: it is the logits themselves only where nothing changes them, or the gradient does.
template <class T>
TFM_INLINE float* place_of(const CrossEntropy& call, T* logits, T* gradient, float* scratch) {
    if (sizeof(T) != sizeof(float))
        return scratch;
    if (gradient)
        return reinterpret_cast<float*>(gradient);
    return call.bias || call.softcap != 0.0f ? scratch : reinterpret_cast<float*>(logits);
}

struct Sums {
    float exponentials, differences; // Σ exp(z - top) and Σ (z - top)
};

// exp(z - top) takes the place of z where KEEP says so.
template <bool KEEP>
TFM_INLINE Sums sum_up(float* z, int64_t classes, float top) {
    Floats sums[4] = {}, totals[4] = {};
    for_vectors(
        classes, TFM_VISIT(column, count, slot) {
            const Floats difference = load(z + column, count) - top, power = exp(difference);
            if (KEEP)
                store(z + column, power, count);
            sums[slot] += inside(power, count);
            totals[slot] += inside(difference, count);
        });
    return {sum((sums[0] + sums[1]) + (sums[2] + sums[3])), sum((totals[0] + totals[1]) + (totals[2] + totals[3]))};
}

// What makes a gradient of exp(z - top), or of z itself under softcap.
struct Slope {
    float scale, floor, top, inverse_cap;

    template <bool CAPPED>
    __attribute__((always_inline)) Floats at(Floats value, float share) const {
        if (!CAPPED)
            return value * scale - floor - share;
        const Floats bent = value * inverse_cap;
        return (exp(value - top) * scale - floor - share) * (1.0f - bent * bent);
    }
};

template <class T, bool CAPPED>
TFM_INLINE void write_gradient(const Slope& slope, const float* z, T* gradient, int64_t classes, int64_t label,
                               float share) {
    const Floats at_label = label < 0 ? Floats{} : slope.at<CAPPED>(broadcast(z[label]), share);
    for_vectors(
        classes, TFM_VISIT(column, count, ) {
            store(gradient + column, slope.at<CAPPED>(load(z + column, count), 0.0f), count);
        });
    if (label >= 0)
        store(gradient + label, at_label, 1);
}

template <class T>
void cross_entropy_rows(const CrossEntropy& call, float* scratch, int64_t first_row, int64_t last_row) {
    const float classes = static_cast<float>(call.classes), nan = __builtin_nanf("");
    for (int64_t row = first_row; row < last_row; ++row) {
        T* const logits = static_cast<T*>(call.logits.data) + row * call.logits.stride;
        T* const gradient =
            call.gradient.data ? static_cast<T*>(call.gradient.data) + row * call.gradient.stride : nullptr;
        const int64_t given = call.target[row];
        if (given == call.ignore_index) {
            if (call.losses)
                call.losses[row] = 0.0f;
            if (gradient)
                __builtin_memset(gradient, 0, call.classes * sizeof(T));
            continue;
        }
        // A target that is no class gives NaN, and is never an address.
        const int64_t label = given >= 0 && given < call.classes ? given : -1;
        float* const z = place_of(call, logits, gradient, scratch);
        const float top = form<T>(call, logits, z), peak = label < 0 ? nan : z[label];
        const bool capped = call.softcap != 0.0f;
        const Sums sums =
            gradient && !capped ? sum_up<true>(z, call.classes, top) : sum_up<false>(z, call.classes, top);
        const float exponentials = sums.exponentials;
        const float logarithm = __builtin_logf(exponentials), lse = top + logarithm;
        if (call.losses) {
            // Differences first: of large logits the sum top + logarithm would round what the loss consists of.
            float loss = (top - peak) + logarithm;
            if (call.smoothing != 0.0f)
                loss = (1.0f - call.smoothing) * loss + call.smoothing * (logarithm - sums.differences / classes);
            if (call.z_loss != 0.0f)
                loss += call.z_loss * lse * lse;
            call.losses[row] = loss;
        }
        if (!gradient)
            continue;
        const float factor = (call.grad ? call.grad[row] : 1.0f) / (call.divisor ? *call.divisor : 1.0f);
        const float mass = label < 0 ? nan : call.z_loss != 0.0f ? 1.0f + 2.0f * call.z_loss * lse : 1.0f;
        const Slope slope{mass / exponentials * factor, call.smoothing / classes * factor, top,
                          capped ? 1.0f / call.softcap : 0.0f};
        const float share = (1.0f - call.smoothing) * factor;
        capped ? write_gradient<T, true>(slope, z, gradient, call.classes, label, share)
               : write_gradient<T, false>(slope, z, gradient, call.classes, label, share);
    }
}

void cross_entropy(const CrossEntropy& call, float* scratch, int64_t first_row, int64_t last_row) {
    call.logits.narrow ? cross_entropy_rows<BFloat16>(call, scratch, first_row, last_row)
                       : cross_entropy_rows<float>(call, scratch, first_row, last_row);
}

} // namespace tfm::TFM_ISA

#else

#include <memory>

#include "cpu/rows.h"
#include "operators/cross_entropy.h"

namespace tfm {

namespace {

// The gradient is that of the loss times grad[row] / divisor.
template <class Arguments>
void run(const Arguments& a, const MaybeTensor& bias, float* losses, const MaybeTensor& gradient) {
    const int64_t rows = a.logits.size(0), classes = a.logits.size(1);
    const Width width = width_of(a.logits.scalar_type());
    STD_TORCH_CHECK(width != Width::HALF, "logits: expected float32 or bfloat16, got float16");
    const bool narrow = width == Width::BFLOAT16;
    const CrossEntropy call{
        .logits = {a.logits.data_ptr(), narrow, a.logits.stride(0)},
        .gradient = {data_of<void>(gradient), narrow, gradient ? gradient->stride(0) : 0},
        .bias = data_of<float>(bias),
        .target = static_cast<const int64_t*>(a.target.const_data_ptr()),
        .losses = losses,
        .grad = data_of<float>(a.grad),
        .divisor = data_of<float>(a.divisor),
        .classes = classes,
        .ignore_index = a.ignore_index,
        .smoothing = static_cast<float>(a.label_smoothing),
        .z_loss = static_cast<float>(a.z_loss),
        .softcap = static_cast<float>(a.softcap.value_or(0.0)),
    };
    for_rows(rows, classes, [&](int64_t begin, int64_t end) {
        const auto scratch = narrow || !gradient ? std::make_unique_for_overwrite<float[]>(classes) : nullptr;
        TFM_RUN(cross_entropy, call, scratch.get(), begin, end);
    });
}

// In place: of logits whose rows are contiguous, with contiguous vectors, all but the target in fp32.
void cross_entropy_(const arguments::CrossEntropy_& a) {
    run(a, a.bias, data_of<float>(a.losses), a.want_gradient ? MaybeTensor(a.logits) : MaybeTensor());
}

// Beside contiguous logits.
std::tuple<Tensor, MaybeTensor> cross_entropy(const arguments::CrossEntropy& a) {
    Tensor losses = empty({a.logits.size(0)}, ScalarType::Float, a.logits);
    MaybeTensor gradient;
    if (a.want_gradient)
        gradient = torch::stable::empty_like(a.logits);
    run(a, MaybeTensor(), static_cast<float*>(losses.data_ptr()), gradient);
    return {losses, gradient};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) {
    implement<arguments::CrossEntropy_, cross_entropy_>(m);
    implement<arguments::CrossEntropy, cross_entropy>(m);
}

} // namespace tfm

#endif
