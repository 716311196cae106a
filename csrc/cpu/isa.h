// One source, several instruction sets: each kernel file is compiled once for every one of them, and once for the host.
//
// With TFM_ISA defined a file gives its kernels, in namespace tfm::TFM_ISA, which must use no inline function from
// outside that namespace: the linker keeps one copy of those, and an AVX-512 one would stop a processor without it.
// Without TFM_ISA it gives the operators, compiled for any processor, which call the kernels of the set in use.
#pragma once

#include <cstdint>

namespace tfm {

enum class Isa { NONE, NEON, AVX2, AVX512 };

// The widest that this processor has and this library holds, unless tfm_native::use_instruction_set chose another.
Isa instruction_set();

} // namespace tfm

// TFM_KERNEL(name, arguments) declares kernel `name` of every instruction set; TFM_RUN(name, arguments) calls the one
// in use.
#if defined(__x86_64__)
#define TFM_KERNEL(name, ...)                                                                                          \
    namespace avx2 {                                                                                                   \
    void name(__VA_ARGS__);                                                                                            \
    }                                                                                                                  \
    namespace avx512 {                                                                                                 \
    void name(__VA_ARGS__);                                                                                            \
    }
#define TFM_RUN(name, ...)                                                                                             \
    (::tfm::instruction_set() == ::tfm::Isa::AVX512 ? ::tfm::avx512::name(__VA_ARGS__) : ::tfm::avx2::name(__VA_ARGS__))
#else
#define TFM_KERNEL(name, ...)                                                                                          \
    namespace neon {                                                                                                   \
    void name(__VA_ARGS__);                                                                                            \
    }
#define TFM_RUN(name, ...) ::tfm::neon::name(__VA_ARGS__)
#endif
