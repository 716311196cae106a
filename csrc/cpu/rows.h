// How the host part of a CPU operator shares rows among threads, and adds up what blocks of rows have summed.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>

#include "common/tensor.h"
#include "cpu/isa.h"
#include "cpu/matrix.h"

namespace tfm {

inline bool is_narrow(Width width) {
    STD_TORCH_CHECK(width != Width::HALF, "expected float32 or bfloat16 on a CPU, got float16");
    return width == Width::BFLOAT16;
}

inline Matrix matrix(const Rows& x) { return {x.data(), is_narrow(x.width()), x.stride}; }
inline Matrix matrix(const Vector& x) { return {x.data(), is_narrow(x.width()), 0}; }

// The numbers of a vector of any stride, or of a contiguous tensor.
template <class To>
std::vector<To> numbers_of(const Tensor& x) {
    const void* const data = x.const_data_ptr();
    const auto read = [&, step = x.stride(x.dim() - 1)](const auto* from) {
        std::vector<To> found(x.numel());
        for (size_t i = 0; i < found.size(); ++i)
            found[i] = static_cast<To>(from[i * step]);
        return found;
    };
    switch (x.scalar_type()) {
    case ScalarType::Float:
        return read(static_cast<const float*>(data));
    case ScalarType::BFloat16:
        return read(static_cast<const torch::headeronly::BFloat16*>(data));
    case ScalarType::Int:
        return read(static_cast<const int32_t*>(data));
    case ScalarType::Long:
        return read(static_cast<const int64_t*>(data));
    default:
        STD_TORCH_CHECK(false, "expected a vector of int32, int64, float32 or bfloat16");
    }
}

// To a contiguous vector of fp32 or bf16.
template <class From>
void store_numbers(const std::vector<From>& from, const Tensor& to) {
    if (is_narrow(width_of(to.scalar_type())))
        std::copy(from.begin(), from.end(), static_cast<torch::headeronly::BFloat16*>(to.data_ptr()));
    else
        std::copy(from.begin(), from.end(), static_cast<float*>(to.data_ptr()));
}

// Memory of one thread's own, of so many rows of whole vectors.
struct Scratch {
    std::unique_ptr<float[]> memory;

    Scratch(int64_t rows, int64_t columns) : memory(new float[rows * padded(columns)]) {}
};

// kernel(begin, end) over [0, count), on the calling thread where a second one, which costs as much as `worth`, would
// not pay.
template <class Kernel>
void share(int64_t count, int64_t work_of_each, int64_t worth, const Kernel& kernel) {
    const int64_t grain = std::max<int64_t>(1, worth / std::max<int64_t>(1, work_of_each));
    if (count <= grain)
        kernel(0, count);
    else
        torch::stable::parallel_for(0, count, grain, kernel);
}

// The same over rows, whose work is the elements that they have.
template <class Kernel>
void for_rows(int64_t rows, int64_t elements_of_each, const Kernel& kernel) {
    share(rows, elements_of_each, 16384, kernel);
}

// Blocks of rows with sums of their own: their size depends on the number of rows alone, never on the threads.
struct RowBlocks {
    int64_t rows, count;

    explicit RowBlocks(int64_t total)
        : rows(std::max<int64_t>(32, (total + 127) / 128)), count((total + rows - 1) / rows) {}
};

// Adds sums [blocks, parts, columns or more] over the blocks, in their order, into part i's vector where there is one.
template <class Sum = float>
void sum_blocks(const Tensor& sums, std::initializer_list<MaybeTensor> parts) {
    const int64_t blocks = sums.size(0), step = sums.size(1) * sums.size(2);
    const float* from = static_cast<const float*>(sums.const_data_ptr());
    for (const MaybeTensor& part : parts) {
        if (part) {
            const int64_t columns = part->numel();
            std::vector<Sum> total(columns);
            for (int64_t block = 0; block < blocks; ++block)
                for (int64_t column = 0; column < columns; ++column)
                    total[column] += from[block * step + column];
            store_numbers(total, *part);
        }
        from += sums.size(2);
    }
}

} // namespace tfm
