// How activations and their gradients lie in memory: as fp32, or rounded to bf16. All arithmetic is fp32.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

namespace storage {

using bf16 = __nv_bfloat16;

// What an address, which travels as an integer, points to.
template <typename T = float>
__device__ inline const T* input(std::uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

template <typename T = float>
__device__ inline T* output(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

__device__ inline float load(const float* source) { return __ldg(source); }
__device__ inline float2 load2(const float* source) { return __ldg(reinterpret_cast<const float2*>(source)); }
__device__ inline float4 load4(const float* source) { return __ldg(reinterpret_cast<const float4*>(source)); }

// Intrinsics, since the compiler splits the assignment of four values from scattered registers into narrow stores.
__device__ inline void store(float* target, float v) { *target = v; }
__device__ inline void store2(float* target, float2 v) { *reinterpret_cast<float2*>(target) = v; }
__device__ inline void store4(float* target, float4 v) { __stwb(reinterpret_cast<float4*>(target), v); }

// Two values in a word, the first in its lower half.
__device__ inline float2 unpack(unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ inline unsigned pack(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const unsigned&>(pair);
}

__device__ inline float load(const bf16* source) { return __bfloat162float(__ldg(source)); }
__device__ inline float2 load2(const bf16* source) { return unpack(__ldg(reinterpret_cast<const unsigned*>(source))); }
__device__ inline float4 load4(const bf16* source) {
  const uint2 pairs = __ldg(reinterpret_cast<const uint2*>(source));
  const float2 first = unpack(pairs.x), second = unpack(pairs.y);
  return make_float4(first.x, first.y, second.x, second.y);
}

__device__ inline void store(bf16* target, float v) { *target = __float2bfloat16_rn(v); }
__device__ inline void store2(bf16* target, float2 v) { __stwb(reinterpret_cast<unsigned*>(target), pack(v.x, v.y)); }
__device__ inline void store4(bf16* target, float4 v) {
  __stwb(reinterpret_cast<uint2*>(target), make_uint2(pack(v.x, v.y), pack(v.z, v.w)));
}

// To a multiple of 16 bytes.
__device__ inline void store8(bf16* target, const float (&v)[8]) {
  __stwb(reinterpret_cast<uint4*>(target),
         make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])));
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f with the Type that values are stored as.
template <typename F>
auto with_storage(bool is_bf16, F f) {
  return is_bf16 ? f(Type<bf16>()) : f(Type<float>());
}

// The same, and whether products are to be of fp32 grade: TF32 holds what bf16 does.
template <typename F>
auto with_precision(bool is_bf16, bool exact, F f) {
  if (is_bf16) return f(Type<bf16>(), std::false_type());
  return exact ? f(Type<float>(), std::true_type()) : f(Type<float>(), std::false_type());
}

}  // namespace storage
