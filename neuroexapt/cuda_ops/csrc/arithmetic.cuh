// Small functions of numbers that several stages share.
#pragma once

namespace arithmetic {

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ inline float relu(float x) { return x < 0.f ? 0.f : x; }  // NaN passes, as in PyTorch

}  // namespace arithmetic
