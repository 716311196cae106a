/* A libcuda of functions that succeed and do nothing: what triton's launcher calls, but for the driver's own time. */
#include <stddef.h>
#include <stdint.h>

/* Attributes of a device, by CUDA's numbers; what is not named here is the shared memory of an H200's block. */
enum { WARP = 10, REGISTERS = 12, MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76 };
enum { THREADS_OF_A_BLOCK = 0 };

int cuInit(unsigned flags) { return 0; }
int cuCtxGetCurrent(void** context) {
    *context = (void*)1;
    return 0;
}
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetDevice(int* device) {
    *device = 0;
    return 0;
}
int cuCtxGetLimit(size_t* value, int limit) {
    *value = 1 << 20;
    return 0;
}
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return 0;
}
int cuDeviceGetCount(int* count) {
    *count = 1;
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
    case WARP:
        *value = 32;
        break;
    case REGISTERS:
        *value = 65536;
        break;
    case MULTIPROCESSORS:
        *value = 132;
        break;
    case MAJOR:
        *value = 9;
        break;
    case MINOR:
        *value = 0;
        break;
    default:
        *value = 232448;
    }
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = (void*)1;
    return 0;
}
int cuDevicePrimaryCtxRelease(int device) { return 0; }
int cuDriverGetVersion(int* version) {
    *version = 12080;
    return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
    *value = attribute == THREADS_OF_A_BLOCK ? 1024 : 0;
    return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuGetErrorString(int error, const char** text) {
    *text = "no driver";
    return 0;
}
int cuModuleLoadData(void** module, const void* data) {
    *module = (void*)2;
    return 0;
}
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = (void*)3;
    return 0;
}
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** parameters, void** extra) {
    return 0;
}
int cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) { return 0; }
int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
    *(uint64_t*)value = pointer;
    return 0;
}
int cuPointerGetAttributes(unsigned count, int* attributes, void** values, uint64_t pointer) { return 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, void* config) {
    *count = 1;
    return 0;
}
int cuStreamIsCapturing(void* stream, int* status) {
    *status = 0;
    return 0;
}
int cuMemGetInfo_v2(size_t* available, size_t* total) {
    *available = *total = 1u << 30;
    return 0;
}
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
