// How the host part of an operator meets its GPU: torch's device and stream, a kernel's launch, its shared memory.
//
// Under tests/cuda_emulation the same names run the kernels on the CPU, for operators of CPU tensors.
#pragma once

#include <cuda_runtime.h>

#include "common/tensor.h"

#ifdef TFM_CUDA_EMULATION
#define TFM_CUDA_KEY CPU
#else
#define TFM_CUDA_KEY CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace tfm::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

// The dynamic shared memory of the block; how much there is, the launch says.
template <class T>
__device__ T* shared_memory() {
#ifdef TFM_CUDA_EMULATION
    return reinterpret_cast<T*>(emulation::shared_memory());
#else
    extern __shared__ uint4 dynamic_shared_memory[];
    return reinterpret_cast<T*>(dynamic_shared_memory);
#endif
}

template <class T>
constexpr T divide_up(T a, T b) {
    return (a + b - 1) / b;
}

#ifdef TFM_CUDA_EMULATION

struct OnDevice {
    cudaStream_t stream = nullptr;
    // Few, so that small tests have blocks that go over their rows more than once.
    int multiprocessors = 2;

    explicit OnDevice(const Tensor&) {}
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
    auto body = [&] { kernel(arguments...); };
    emulation::run(grid, block, shared_bytes, [](void* run) { (*static_cast<decltype(body)*>(run))(); }, &body);
}

#else

inline void check(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status)); }

// torch's current stream. Its function is looked up where torch has loaded it, so that a library compiled beside a
// torch without CUDA serves one with it.
inline cudaStream_t current_stream(int32_t device) {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const auto get = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(get, "expected a torch with CUDA, got one without libtorch_cuda.so");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(get(device, &stream));
    return static_cast<cudaStream_t>(stream);
}

// Makes a tensor's device the current one for as long as it lives.
struct OnDevice {
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream;
    int multiprocessors;

    explicit OnDevice(const Tensor& x) : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
    }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
    // What a block may have without asking.
    if (shared_bytes > 48 * 1024)
        check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    check(cudaGetLastError());
}

#endif

} // namespace tfm::cuda
