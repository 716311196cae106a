// What the library says of itself, and the module that Python imports.
//
// Python defines the operators, as it does those of Triton (tfm/operators). Their implementations stand at the foot of
// the files of their subjects, cpu/name.cpp and cuda/name.cu.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "common/tensor.h"
#include "operators/digest.h"

STABLE_TORCH_LIBRARY(tfm_native, m) {
    // "avx512", "avx2", "neon", or "none" where no kernel for CPUs can run.
    m.def("instruction_set() -> str");
    m.def("use_instruction_set(str name) -> ()");
    m.def("has_cuda() -> bool");
    // A word for the declarations that it was compiled from.
    m.def("declarations() -> str");
}

namespace {

bool has_cuda() {
#ifdef TFM_WITH_CUDA
    return true;
#else
    return false;
#endif
}

std::string declarations() { return TFM_DECLARATIONS; }

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "tfm_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

} // namespace

STABLE_TORCH_LIBRARY_IMPL(tfm_native, CompositeExplicitAutograd, m) {
    m.impl("has_cuda", TORCH_BOX(&has_cuda));
    m.impl("declarations", TORCH_BOX(&declarations));
}

// Importing it registers the operators; it has no other contents.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit_tfm_native(void) {
    return PyModule_Create(&definition);
}
