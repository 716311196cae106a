// A linear layer's products, by torch's own library.
#pragma once

#include <array>

#include "common/tensor.h"

namespace tfm {

// x weightᵀ + bias, in the dtype of x.
inline Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
    using torch::stable::detail::from;
    const bool converts = bias && bias->scalar_type() != x.scalar_type();
    std::array<StableIValue, 3> stack{from(x), from(weight),
                                      from(converts ? MaybeTensor(torch::stable::to(*bias, x.scalar_type())) : bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// Of two weights, the products side by side: gate first.
inline Tensor gate_and_up(const Tensor& x, const Tensor& gate, const Tensor& up) {
    using torch::stable::detail::from;
    Tensor pre = empty({x.size(0), 2 * gate.size(0)}, x.scalar_type(), x);
    for (const auto& [weight, first] : {std::pair(gate, int64_t{0}), std::pair(up, gate.size(0))}) {
        const Tensor half = torch::stable::narrow(pre, 1, first, gate.size(0));
        std::array<StableIValue, 3> stack{from(x), from(torch::stable::transpose(weight, 0, 1)), from(half)};
        TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
        torch::stable::detail::to<Tensor>(stack[0]);
    }
    return pre;
}

} // namespace tfm
