// Copies into shared memory that nobody waits for until he has to, and that take no registers on their way.
#pragma once

#include <cuda_runtime.h>

namespace async_copy {

// 16 bytes, or zeros.
__device__ inline void copy_async(float* target, const float* source, bool exists = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(target))),
               "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}

// 4 bytes, or zeros.
__device__ inline void copy4_async(float* target, const float* source, bool exists = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(unsigned(__cvta_generic_to_shared(target))),
               "l"(source), "r"(exists ? 4 : 0)
               : "memory");
}

// For this thread's own; for those of others a barrier has to follow.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace async_copy
