// Row numbers that the host part of a CPU operator reads from tensors: tokens and positions.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor.h"

namespace tfm {

using Numbers = std::vector<int64_t>;

// Integers of any strides, broadcast to `shape`, one after the other.
inline Numbers numbers_of(const Tensor& x, const std::vector<int64_t>& shape) {
    const int64_t missing = static_cast<int64_t>(shape.size()) - x.dim();
    Numbers numbers{0};
    for (int64_t dim = 0; dim < static_cast<int64_t>(shape.size()); ++dim) {
        const bool repeats = dim < missing || x.size(dim - missing) == 1;
        const int64_t step = repeats ? 0 : x.stride(dim - missing);
        Numbers inner;
        inner.reserve(numbers.size() * shape[dim]);
        for (const int64_t offset : numbers)
            for (int64_t i = 0; i < shape[dim]; ++i)
                inner.push_back(offset + i * step);
        numbers = std::move(inner);
    }
    const void* data = x.const_data_ptr();
    for (int64_t& number : numbers)
        number = x.scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(data)[number]
                                                     : static_cast<const int32_t*>(data)[number];
    return numbers;
}

// An out_of_range is Python's IndexError, as it is torch's.
inline void check_inside(const char* name, int64_t number, int64_t rows) {
    if (number < 0 || number >= rows)
        throw std::out_of_range(std::string(name) + ": expected rows 0 to " + std::to_string(rows - 1) + ", got " +
                                std::to_string(number) + ", out of range");
}

inline void check_inside(const char* name, const Numbers& numbers, int64_t rows) {
    for (const int64_t number : numbers)
        check_inside(name, number, rows);
}

} // namespace tfm
