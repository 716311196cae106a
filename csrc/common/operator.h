// How an operator takes its arguments from torch and gives its results back.
//
// The structs of the arguments are made from tfm/operators (tfm/native/header.py); an operator's file includes those of
// its subject, "operators/norm.h", and ends in
//
//     STABLE_TORCH_LIBRARY_IMPL(tfm_native, CPU, m) { implement<arguments::ResidualNorm, residual_norm>(m); }
#pragma once

#include <tuple>
#include <type_traits>

#include "common/tensor.h"

namespace tfm {

template <class T>
struct IsTuple : std::false_type {};
template <class... T>
struct IsTuple<std::tuple<T...>> : std::true_type {};

// What torch calls: arguments come, and results go, on one stack.
template <class Arguments, auto FUNCTION>
void boxed(StableIValue* stack, uint64_t count, uint64_t) {
    STD_TORCH_CHECK(count == Arguments::COUNT, Arguments::NAME, ": expected ", Arguments::COUNT, " arguments, got ",
                    count);
    using Result = decltype(FUNCTION(Arguments::take(stack)));
    if constexpr (std::is_void_v<Result>) {
        FUNCTION(Arguments::take(stack));
    } else if constexpr (IsTuple<Result>::value) {
        size_t place = 0;
        std::apply([&](auto&&... x) { ((stack[place++] = torch::stable::detail::from(x)), ...); },
                   FUNCTION(Arguments::take(stack)));
    } else {
        stack[0] = torch::stable::detail::from(FUNCTION(Arguments::take(stack)));
    }
}

template <class Arguments, auto FUNCTION, class Library>
void implement(Library& library) {
    library.impl(Arguments::NAME, &boxed<Arguments, FUNCTION>);
}

} // namespace tfm
