// A matrix of fp32, bf16 or fp16 as the kernels see it, eight columns at a time.
//
// `Uniform`, `Mixed` and `Ragged` are the three ways to a matrix, and what kernels are templates of: all matrices of
// one dtype, in vectors; each of its own, in vectors; and, element by element, any number of columns at any address.
// `Any` is the way to what may have a dtype of its own beside them, as parameters do. BLOCKS of 256 threads are what a
// kernel's registers must leave room for on a multiprocessor.
#pragma once

#include <initializer_list>

#include "cuda/vector.cuh"

namespace tfm::cuda {

// Where numbers lie, their dtype, and how many of them rows are apart; null where there are none.
struct Matrix {
    void* data;
    Width width;
    int64_t stride;
};

inline Matrix matrix(const Rows& x) { return {x.data(), x.width(), x.stride}; }
inline Matrix matrix(const Vector& x) { return {x.data(), x.width(), 0}; }

// Calls use(T*) with the address of element `place`.
template <class Use>
__device__ auto at(const Matrix& m, int64_t place, const Use& use) {
    switch (m.width) {
    case Width::FLOAT:
        return use(static_cast<float*>(m.data) + place);
    case Width::BFLOAT16:
        return use(static_cast<__nv_bfloat16*>(m.data) + place);
    default:
        return use(static_cast<__half*>(m.data) + place);
    }
}

// A vector of int32 or int64; null where absent.
struct Integers {
    const void* data;
    bool is_wide;

    __device__ __forceinline__ int64_t operator[](int64_t i) const {
        return is_wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

inline Integers integers(const Vector& x) {
    return {x.data(), x.tensor && x.tensor->scalar_type() == ScalarType::Long};
}

struct Mixed {
    using Any = Mixed;
    static constexpr int BLOCKS = 1;

    static __device__ Octet load(const Matrix& m, int64_t place, int) {
        return at(m, place, [](auto* from) { return load_vectors(from); });
    }
    static __device__ Octet store(const Matrix& m, int64_t place, const Octet& octet, int) {
        return at(m, place, [&](auto* to) { return store_vectors(to, octet); });
    }
};

template <class T>
struct Uniform {
    using Any = Mixed;
    static constexpr int BLOCKS = 2;

    static __device__ Octet load(const Matrix& m, int64_t place, int) {
        return load_vectors(static_cast<const T*>(m.data) + place);
    }
    static __device__ Octet store(const Matrix& m, int64_t place, const Octet& octet, int) {
        return store_vectors(static_cast<T*>(m.data) + place, octet);
    }
};

// `count` columns are left; beyond them 0 is read and nothing stored.
struct Ragged {
    using Any = Ragged;
    static constexpr int BLOCKS = 1;

    static __device__ Octet load(const Matrix& m, int64_t place, int count) {
        return at(m, place, [&](auto* from) {
            Octet octet;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                octet[i] = i < count ? widen(from[i]) : 0.0f;
            return octet;
        });
    }
    static __device__ Octet store(const Matrix& m, int64_t place, const Octet& octet, int count) {
        return at(m, place, [&](auto* to) {
            Octet stored{};
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count) {
                    narrow(octet[i], to[i]);
                    stored[i] = widen(to[i]);
                }
            return stored;
        });
    }
};

// Calls use(Access()) with the fastest way to all of these matrices that fits; absent ones do not count.
template <class Use>
void with_access(int64_t columns, std::initializer_list<Matrix> matrices, std::initializer_list<Matrix> parameters,
                 const Use& use) {
    bool vectors = columns % 8 == 0, uniform = true;
    const Width width = matrices.begin()->width;
    const auto see = [&](const Matrix& m) {
        const int64_t row_bytes = m.stride * (m.width == Width::FLOAT ? 4 : 2);
        vectors &= row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
    };
    for (const Matrix& m : matrices) {
        if (!m.data)
            continue;
        see(m);
        uniform &= m.width == width;
    }
    for (const Matrix& m : parameters)
        see(m);
    if (!vectors)
        use(Ragged());
    else if (!uniform)
        use(Mixed());
    else if (width == Width::FLOAT)
        use(Uniform<float>());
    else if (width == Width::BFLOAT16)
        use(Uniform<__nv_bfloat16>());
    else
        use(Uniform<__half>());
}

} // namespace tfm::cuda
