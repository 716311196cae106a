// The results of the norm's operators, still empty.
#pragma once

#include "operators/norm.h"

namespace tfm {

using NormResults = std::tuple<Tensor, MaybeTensor, Tensor>;
using NormGradients = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;

// (y, h, statistics); no h without a residual.
inline NormResults norm_results(const arguments::ResidualNorm& a, int64_t rows) {
    const ScalarType stored = a.residual ? promote(a.x.scalar_type(), a.residual->scalar_type()) : a.x.scalar_type();
    return {empty(shape_of(a.x), a.out_dtype.value_or(stored), a.x),
            a.residual ? MaybeTensor(empty(shape_of(a.x), stored, a.x)) : MaybeTensor(),
            empty({a.centred ? 2 : 1, rows}, ScalarType::Float, a.x)};
}

// (dx, dx_bias, dresidual, dweight, dbias), those that are wanted.
inline NormGradients norm_gradients(const arguments::ResidualNormBackward& a, int64_t columns) {
    const auto output = [&](MaybeType type, std::vector<int64_t> shape) {
        return type ? MaybeTensor(empty(shape, *type, a.h)) : MaybeTensor();
    };
    return {output(a.dx, shape_of(a.h)), output(a.dx_bias, {columns}), output(a.dresidual, shape_of(a.h)),
            output(a.dweight, {columns}), output(a.dbias, {columns})};
}

} // namespace tfm
