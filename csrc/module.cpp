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

    m.def("activation_dropout(Tensor pre, bool gated, str activation, float dropout_p, Tensor? seed, int site)"
          " -> Tensor");
    m.def("linear_activation(Tensor x, Tensor weight, Tensor? up_weight, Tensor? bias, bool gated, str activation,"
          " float dropout_p, Tensor? seed, int site, bool save) -> (Tensor hidden, Tensor pre)");
    m.def("linear_activation_backward(Tensor dy, Tensor weight, Tensor saved, bool gated, str activation,"
          " float dropout_p, Tensor? seed, int site, bool recompute, ScalarType? dbias)"
          " -> (Tensor, Tensor?, Tensor?)");

    // Of a chunk of logits, in place; what tfm/native/cross_entropy.py calls between its products.
    m.def("cross_entropy_(Tensor(a!) logits, Tensor? bias, Tensor target, Tensor(b!)? losses, int ignore_index,"
          " float label_smoothing, float z_loss, float? softcap, bool want_gradient, Tensor? grad, Tensor? divisor)"
          " -> ()");

#define ATTENTION                                                                                                      \
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? words, Tensor? reach, Tensor? sinks,"               \
    " Tensor? cu_seq_q, Tensor? cu_seq_k, Tensor? key_lengths, Tensor? starts, Tensor? seed, SymInt max_q,"            \
    " SymInt max_k, SymInt start, int? left, int? right, float scale, float? softcap, float dropout_p, int site"
    m.def("attention(" ATTENTION ") -> (Tensor output, Tensor statistics)");
    m.def("attention_backward(Tensor dout, Tensor? dlse, Tensor output, Tensor statistics, bool[] wanted, " ATTENTION
          ")"
          " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
    m.def("attention_weights(Tensor statistics, " ATTENTION ") -> Tensor");
    m.def("attention_mask_bits(Tensor mask, Tensor? starts, SymInt start, int? left, int? right)"
          " -> (Tensor words, Tensor reach)");
    // As attention_backward, with the gradients of two or three views of one tensor side by side, [parts, ...].
    m.def("attention_backward_joined(Tensor dout, Tensor? dlse, Tensor output, Tensor statistics, bool[] wanted,"
          " int parts, " ATTENTION ") -> (Tensor? dquery, Tensor joined, Tensor? dbias, Tensor? dsinks)");
#undef ATTENTION
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
