// What the forward and backward convolution stages of a reduction cell share.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "arithmetic.cuh"
#include "cell_strided.h"
#include "launch.cuh"
#include "tensor_core.cuh"
#include "tiles.cuh"

namespace cell_strided {
namespace {

using arithmetic::ceil_div;
using arithmetic::relu;
using launching::launch;
using tensor_core::Fragment;
using tensor_core::multiply;
using tensor_core::multiply_strip;
using tensor_core::place_of_column;
using tensor_core::sum_over_quad;
using tensor_core::unbiased;
using namespace tiles;

constexpr int kStrip = 4;  // neighbouring pixels that a lane computes at a time

// Columns of a tile of output pixels: a search network's usual pictures fill it.
template <int C>
constexpr int kWidth = C == 64 ? 8 : 16;
template <int C>
constexpr int kStripsPerRow = kWidth<C> / kStrip;

// Without a branch, for which the compiler writes out what follows twice.
__device__ inline void store4_if(bool wanted, float* target, float4 v) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n"
      "@wanted st.global.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(target),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(unsigned(wanted))
      : "memory");
}

__device__ inline void store4_if(bool wanted, storage::bf16* target, float4 v) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %3, 0;\n"
      "@wanted st.global.v2.u32 [%0], {%1, %2};\n}" ::"l"(target),
      "r"(storage::pack(v.x, v.y)), "r"(storage::pack(v.z, v.w)), "r"(unsigned(wanted))
      : "memory");
}

__device__ inline float4 relu4(float4 v) { return make_float4(relu(v.x), relu(v.y), relu(v.z), relu(v.w)); }

// N floats from a multiple of 16 bytes on.
template <int N>
__device__ void load_window(float (&window)[N], const float* source) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(source + i);
    window[i] = v.x, window[i + 1] = v.y, window[i + 2] = v.z, window[i + 3] = v.w;
  }
}

// Calls f with the channels, the Type of pictures and the precision of products.
template <typename F>
auto specialise(const Shape& shape, F f) {
  const auto with_precision = [&](auto channels) {
    return storage::with_precision(shape.bf16, shape.exact,
                                   [&](auto type, auto exact) { return f(channels, type, exact); });
  };
  switch (shape.channels) {
    case 16: return with_precision(std::integral_constant<int, 16>());
    case 32: return with_precision(std::integral_constant<int, 32>());
    case 64: return with_precision(std::integral_constant<int, 64>());
    default: throw std::invalid_argument("the cell's convolutions take 16, 32 or 64 channels");
  }
}

}  // namespace
}  // namespace cell_strided
