// Launching kernels whose only argument is a struct by value, which a CUDA graph can capture.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

namespace launching {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Whether blocks of a kernel can take their places while the kernel before is still running.
inline bool can_launch_early() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

// For kernels that begin with await_stream(). They are launched early where that can be, which hides some of what a
// launch costs.
template <typename Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, dim3 threads, int shared_bytes, std::uintptr_t stream,
            const Parameters& parameters) {
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &early, config.numAttrs = can_launch_early() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, parameters));
}

// Waits until the kernel before in the stream is complete, since that may have written what this one reads or may
// read what this one writes; then lets the next one be launched. Nothing may touch memory before it.
__device__ inline void await_stream() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace launching
