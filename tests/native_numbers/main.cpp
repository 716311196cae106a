// Prints for each function of one number that csrc/cpu computes with its own polynomials, in the instruction set that
// this is compiled for, its name and by how many units in the last place it errs at most.
//
// Numbers are taken evenly among all floats of a range, so that every exponent has its share; the truth is the standard
// library's in double. A range ends where results are no normal numbers.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>

#include "cpu/activations.h"
#include "cpu/attention/softmax.h"

namespace tfm::TFM_ISA {

namespace {

constexpr int64_t COUNT = 1 << 18;

// Neighbouring floats have neighbouring numbers.
int64_t number_of(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x);
    return bits < 0 ? int64_t{INT32_MIN} - bits : bits;
}

float float_of(int64_t number) {
    return std::bit_cast<float>(static_cast<int32_t>(number < 0 ? int64_t{INT32_MIN} - number : number));
}

double units(float found, double truth) {
    int exponent;
    std::frexp(truth, &exponent);
    return std::fabs(found - truth) / std::ldexp(1.0, std::max(exponent, -125) - 24);
}

template <class Found, class Truth>
void measure(const char* name, float from, float to, Found found, Truth truth) {
    const int64_t first = number_of(from), last = number_of(to), step = (last - first) / COUNT + 1;
    double worst = 0.0;
    for (int64_t place = first; place <= last; place += step * WIDTH) {
        float given[WIDTH], results[WIDTH];
        for (int i = 0; i < WIDTH; ++i)
            given[i] = float_of(std::min(place + i * step, last));
        store(results, found(load(given)));
        for (int i = 0; i < WIDTH; ++i) {
            const double error = units(results[i], truth(static_cast<double>(given[i])));
            // NaN is no small error.
            worst = error <= worst ? worst : error;
        }
    }
    std::printf("%s %.3f\n", name, worst);
}

double normal_distribution(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

} // namespace

} // namespace tfm::TFM_ISA

#define TFM_OF(expression) [](Floats x) __attribute__((always_inline)) { return expression; }

int main() {
    using namespace tfm;
    using namespace tfm::TFM_ISA;
    measure("exp2", -125.0f, -0.0f, TFM_OF(TFM_ISA::exp2(x)), [](double x) { return std::exp2(x); });
    measure("log2", 1.0f, 2.0f, TFM_OF(TFM_ISA::log2(x)), [](double x) { return std::log2(x); });
    measure("log2 of many", 2.0f, 1e9f, TFM_OF(TFM_ISA::log2(x)), [](double x) { return std::log2(x); });
    measure("exp", -87.0f, 88.7f, TFM_OF(TFM_ISA::exp(x)), [](double x) { return std::exp(x); });
    measure("tanh", -20.0f, 20.0f, TFM_OF(TFM_ISA::tanh(x)), [](double x) { return std::tanh(x); });
    measure("logistic", -87.0f, 20.0f, TFM_OF(logistic(x).value), [](double x) { return 1.0 / (1.0 + std::exp(-x)); });
    measure("normal", -12.8f, 8.0f, TFM_OF(normal(x).value), normal_distribution);
    measure("density", -12.8f, 12.8f, TFM_OF(normal(x).derivative),
            [](double x) { return std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI); });
    // Floats between these hold half of all floats, and errors hide where few of them are.
    measure("tanh near 1/2", 0.25f, 1.0f, TFM_OF(TFM_ISA::tanh(x)), [](double x) { return std::tanh(x); });
    measure("logistic near 0", -8.0f, -0.25f, TFM_OF(logistic(x).value),
            [](double x) { return 1.0 / (1.0 + std::exp(-x)); });
    measure("normal near 0", -4.0f, -0.25f, TFM_OF(normal(x).value), normal_distribution);
    return 0;
}
