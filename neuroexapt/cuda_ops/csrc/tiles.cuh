// Tiles in shared memory and their ways in and out, for the convolution stages of fused cells.
#pragma once

#include "storage.cuh"

namespace tiles {

using storage::load4;
using storage::store4;

// threadIdx.x, unknown to the compiler: which would else compute all addresses of a loop's body ahead of the loop.
__device__ inline int thread_index() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

__device__ inline float4 read4(const float* shared) { return *reinterpret_cast<const float4*>(shared); }

__device__ inline float component(const float4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// The least number from `floats` on that leaves `remainder` when divided by the 32 banks.
__host__ __device__ constexpr int pad_to_bank(int floats, int remainder) {
  return floats + ((remainder - floats) % 32 + 32) % 32;
}

constexpr int kTapsPitch = 28;  // of a channel's depthwise weights

// For one aligned load a row: the first three or four weights of every row, four floats apart, then the fifth of
// every row.
__device__ inline int tap_position(int tap, int kernel_size) {
  const int ky = tap / kernel_size, kx = tap % kernel_size;
  return kx < 4 ? 4 * ky + kx : 20 + ky;
}

template <int K>
__device__ void load_tap_row(float (&taps)[K], const float* channel_taps, int ky) {
  const float4 v = *reinterpret_cast<const float4*>(channel_taps + 4 * ky);
  taps[0] = v.x, taps[1] = v.y, taps[2] = v.z;
  if constexpr (K == 5) taps[3] = v.w, taps[4] = channel_taps[20 + ky];
}

}  // namespace tiles
