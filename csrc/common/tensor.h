// Checks and views of torch's tensors through its stable ABI: what an operator's host part does before its kernel runs.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/activation.h"
#include "common/philox.h"

namespace tfm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeType = std::optional<ScalarType>;

// As the kernels know them: where numbers lie, and how wide they are.
enum class Width : int8_t { FLOAT, BFLOAT16, HALF };

inline Width width_of(ScalarType type) {
    switch (type) {
    case ScalarType::Float:
        return Width::FLOAT;
    case ScalarType::BFloat16:
        return Width::BFLOAT16;
    case ScalarType::Half:
        return Width::HALF;
    default:
        STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
    }
}

// The wider of two dtypes as torch promotes them: two different narrow ones meet in fp32.
inline ScalarType promote(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like) {
    return torch::stable::new_empty(like, shape, type);
}

inline std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline bool is_side_by_side(const Tensor& x) { return x.stride(x.dim() - 1) == 1; }

// x with neighbouring columns side by side, copied where they are not.
inline Tensor side_by_side(const Tensor& x) { return is_side_by_side(x) ? x : torch::stable::contiguous(x); }

// Null where there is no tensor.
template <class T>
T* data_of(const MaybeTensor& x) {
    return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

// [..., columns] seen as rows so many elements apart, each contiguous; holds the copy where the strides allow no view.
struct Rows {
    Tensor tensor;
    int64_t rows, columns, stride;

    explicit Rows(const Tensor& x) : tensor(x), columns(x.size(x.dim() - 1)) {
        rows = columns == 0 ? 0 : x.numel() / columns;
        if (!fits()) {
            tensor = torch::stable::contiguous(x);
            stride = columns;
        }
    }

    void* data() const { return tensor.data_ptr(); }
    Width width() const { return width_of(tensor.scalar_type()); }

private:
    // Whether one stride leads from each row to the next.
    bool fits() {
        const int64_t last = tensor.dim() - 1;
        stride = columns;
        if (columns > 1 && tensor.stride(last) != 1)
            return false;
        int64_t expected = 0;
        for (int64_t dim = last - 1; dim >= 0; --dim) {
            if (tensor.size(dim) == 1)
                continue;
            if (expected == 0)
                stride = tensor.stride(dim);
            else if (tensor.stride(dim) != expected)
                return false;
            expected = tensor.stride(dim) * tensor.size(dim);
            // Rows that all lie on one another: the next dimension must not move either.
            if (stride == 0 && dim > 0 && tensor.numel() != tensor.size(dim) * columns)
                return false;
        }
        return true;
    }
};

// A vector of parameters, contiguous; null where there is none.
struct Vector {
    MaybeTensor tensor;

    explicit Vector(const MaybeTensor& x) {
        if (x)
            tensor = x->is_contiguous() ? *x : torch::stable::contiguous(*x);
    }

    void* data() const { return data_of<void>(tensor); }
    Width width() const { return tensor ? width_of(tensor->scalar_type()) : Width::FLOAT; }
};

inline Activation activation_of(const std::string& name) {
    constexpr const char* NAMES[] = {"relu", "relu_squared", "gelu",    "gelu_tanh",
                                     "silu", "quick_gelu",   "sigmoid", "tanh"};
    for (int8_t i = 0; i < 8; ++i)
        if (name == NAMES[i])
            return static_cast<Activation>(i);
    STD_TORCH_CHECK(false, "activation: expected one of tfm.ops.feed_forward, got ", name);
}

// p of 65,536 outcomes, rounded as Python rounds: half to even.
inline Dropout dropout_of(const MaybeTensor& seed, double p, int64_t site) {
    const double threshold = std::nearbyint(65536 * p);
    const double scale = threshold < 65536 ? 65536 / (65536 - threshold) : 0.0;
    return {seed ? static_cast<const int64_t*>(seed->data_ptr()) : nullptr, static_cast<uint32_t>(threshold),
            static_cast<float>(scale), static_cast<uint32_t>(site)};
}

} // namespace tfm
