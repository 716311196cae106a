// Activations by their names in tfm.ops.feed_forward; cpu/activations.h and cuda/activations.cuh compute them.
#pragma once

#include <cstdint>

namespace tfm {

enum class Activation : int8_t { RELU, RELU_SQUARED, GELU, GELU_TANH, SILU, QUICK_GELU, SIGMOID, TANH };

} // namespace tfm
