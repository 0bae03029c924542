// Launching kernels whose only argument is a struct by value, which a CUDA graph can capture.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

namespace launching {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
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

}  // namespace launching
