// Launching kernels whose only argument is a struct by value, which a CUDA graph can capture.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

namespace launching {

constexpr int kMultiprocessors = 132;  // that launches are cut for

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it, else the next launch would be blamed for it
  throw std::runtime_error(cudaGetErrorString(error));
}

// Kernels can be launched early from compute capability 9.0 on.
inline bool can_launch_early() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

template <typename Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, dim3 threads, int shared_bytes, std::uintptr_t stream,
            const Parameters& parameters) {
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(parameters);
  check(cudaGetLastError());
}

// For small kernels that merge what the one before left: half of their time is that of the launch. Their blocks take
// their places once all of the kernel before have called let_next_begin() or are done, and begin by waiting for it.
// Not for large ones: their blocks would crowd on the multiprocessors that are free first. `early`: whether a kernel of
// ours comes before, which a stream that has just waited for another one does not know.
template <typename Parameters>
void launch_early(void (*kernel)(Parameters), dim3 grid, dim3 threads, std::uintptr_t stream,
                  const Parameters& parameters, bool early = true) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = early && can_launch_early() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, parameters));
}

__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before is complete and what it wrote can be seen. Nothing may touch memory before.
__device__ inline void await_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace launching
