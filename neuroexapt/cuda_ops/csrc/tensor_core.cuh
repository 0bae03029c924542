// Products of 16 x 8 by 8 x 8 matrices on the tensor cores, of TF32 or of fp32 grade.
#pragma once

#include <cstdint>

namespace tensor_core {

__device__ inline uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// Operands of the tensor cores: N values rounded to TF32 and, for products of fp32 grade, what that cut off.
template <int N, bool kExact>
struct Fragment {
  uint32_t high[N], low[kExact ? N : 1];

  __device__ void set(int i, float v) {
    high[i] = to_tf32(v);
    if constexpr (kExact) low[i] = to_tf32(v - __uint_as_float(high[i]));
  }
  // Not rounded, which takes three instructions: the tensor cores cut off what TF32 does not hold.
  __device__ void set_cut(int i, float v) {
    if constexpr (kExact) set(i, v);
    else high[i] = __float_as_uint(v);
  }
};

// Of values whose mantissas are spread log-uniformly, as those of products and sums are, 2^-11 / (2 ln 2) is cut off on
// average. One factor of every product, or the sum of products, that is passed through here makes up for both operands,
// or for one where the other has no more digits than TF32: their errors are without bias and 6 % larger (root mean
// square) than if they had been rounded.
template <bool kExact, int kOperandsCut = 2>
__device__ float unbiased(float v) {
  constexpr float kCutOff = 0.7213475f / 2048;
  return kExact ? v : v * (1.f + kOperandsCut * kCutOff);
}

template <bool kExact>
__device__ float4 unbiased(float4 v) {
  return make_float4(unbiased<kExact>(v.x), unbiased<kExact>(v.y), unbiased<kExact>(v.z), unbiased<kExact>(v.w));
}

__device__ inline void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Which of eight neighbours column n of a product stands for, where lanes store the even and then the odd columns: so
// that what they store together is neighbours.
__device__ inline int place_of_column(int n) { return n / 2 + n % 2 * 4; }

// sums [16, 8] += a [16, 8] · b [8, 8]. With g = lane / 4 and q = lane % 4 a lane holds
// a: (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); b: (q, g), (q + 4, g);
// sums: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
template <bool kExact>
__device__ void multiply(float (&sums)[4], const Fragment<4, kExact>& a, const Fragment<2, kExact>& b) {
  if constexpr (kExact) {
    mma(sums, a.low, b.high);
    mma(sums, a.high, b.low);
  }
  mma(sums, a.high, b.high);
}

// sums += W · d for T · 8 columns: the lane's weights of M · 16 rows, upper and lower eight, and its two rows of d.
template <bool kExact, int M, int T>
__device__ void multiply_strip(float (&sums)[M][T][4], const float2 (&weights)[M][2], const float (&first)[T],
                               const float (&second)[T]) {
  Fragment<2, kExact> right[T];
#pragma unroll
  for (int t = 0; t < T; ++t) {
    right[t].set_cut(0, first[t]);
    right[t].set_cut(1, second[t]);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const float2 upper = weights[m][0], lower = weights[m][1];
    Fragment<4, kExact> left;
    left.set_cut(0, unbiased<kExact>(upper.x)), left.set_cut(1, unbiased<kExact>(lower.x));
    left.set_cut(2, unbiased<kExact>(upper.y)), left.set_cut(3, unbiased<kExact>(lower.y));
#pragma unroll
    for (int t = 0; t < T; ++t) multiply<kExact>(sums[m][t], left, right[t]);
  }
}

__device__ inline float sum_over_quad(float v) {  // of the four lanes that share g
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// Lane q of the four gets the sum of the q-th values. They swap halves twice, where a sum of each would take eight
// exchanges.
__device__ inline float sums_over_quad(float v0, float v1, float v2, float v3) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const float lower_pair = (odd ? v1 : v0) + __shfl_xor_sync(~0u, odd ? v0 : v1, 1);
  const float upper_pair = (odd ? v3 : v2) + __shfl_xor_sync(~0u, odd ? v2 : v3, 1);
  return (upper ? upper_pair : lower_pair) + __shfl_xor_sync(~0u, upper ? lower_pair : upper_pair, 2);
}

}  // namespace tensor_core
