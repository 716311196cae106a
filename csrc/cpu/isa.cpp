// Which instruction set the kernels use: found once, or chosen by tests.
#include "cpu/isa.h"

#include <atomic>

#include "common/tensor.h"

namespace tfm {

namespace {

Isa widest() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return Isa::AVX512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::AVX2 : Isa::NONE;
#else
    return Isa::NEON;
#endif
}

std::atomic<Isa> chosen{widest()};

const char* name_of(Isa isa) {
    switch (isa) {
    case Isa::AVX512:
        return "avx512";
    case Isa::AVX2:
        return "avx2";
    case Isa::NEON:
        return "neon";
    default:
        return "none";
    }
}

std::string instruction_set_name() { return name_of(instruction_set()); }

void use_instruction_set(std::string name) {
    for (Isa isa : {Isa::NEON, Isa::AVX2, Isa::AVX512}) {
        const bool runs = isa == widest() || (isa == Isa::AVX2 && widest() == Isa::AVX512);
        if (name == name_of(isa) && runs) {
            chosen = isa;
            return;
        }
    }
    STD_TORCH_CHECK(false, "instruction set: expected one that this processor has, got ", name);
}

} // namespace

Isa instruction_set() { return chosen.load(std::memory_order_relaxed); }

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CompositeExplicitAutograd, m) {
    m.impl("instruction_set", TORCH_BOX(&instruction_set_name));
    m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
}

} // namespace tfm
