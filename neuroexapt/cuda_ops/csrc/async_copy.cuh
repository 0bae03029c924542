// Copies from global into shared memory that are not waited for at once.
#pragma once

namespace async_copies {

// 16 or 4 bytes, or zeros.
__device__ inline void copy_async(float* target, const float* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(target))),
               "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}

__device__ inline void copy4_async(float* target, const float* source, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(unsigned(__cvta_generic_to_shared(target))),
               "l"(source), "r"(exists ? 4 : 0)
               : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace async_copies
