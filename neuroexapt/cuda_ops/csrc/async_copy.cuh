// Copies from global into shared memory that are not waited for at once.
#pragma once

#include "storage.cuh"

namespace async_copies {

// 16 or 4 bytes, or zeros; or 8 bytes.
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

__device__ inline void copy8_async(float* target, const float* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(unsigned(__cvta_generic_to_shared(target))), "l"(source)
               : "memory");
}

// The same number of values in bf16, which become fp32 on their way through registers and are there at once.
__device__ inline void copy_async(float* target, const storage::bf16* source, bool exists) {
  *reinterpret_cast<float4*>(target) = exists ? storage::load4(source) : make_float4(0.f, 0.f, 0.f, 0.f);
}

__device__ inline void copy4_async(float* target, const storage::bf16* source, bool exists) {
  *target = exists ? storage::load(source) : 0.f;
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace async_copies
