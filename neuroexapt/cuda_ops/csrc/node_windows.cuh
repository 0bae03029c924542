// Windows of pools.
#pragma once

#include "node_common.cuh"

namespace node {

constexpr int kPoolSize = 3;  // the only one that there is

__host__ __device__ inline Shape output_shape(const PoolShape& shape) {
  return {shape.batch, shape.channels, shape.out_height * shape.out_width, shape.bf16};
}

// Lets NaN through.
__device__ inline float larger(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// How much of its average each pixel inside the picture is: of window v of V whose first begins at (top, left).
template <int K, int S, int V>
__device__ float share_of_window(int v, int top, int left, const PoolShape& shape) {
  const auto one_of = [](int count) { return count == 3 ? 1.f / 3.f : count == 2 ? 0.5f : 1.f; };
  // Only the first window can reach beyond the left side, only the last one beyond the right.
  const bool cut_left = v == 0 && left < 0, cut_right = v == V - 1 && left + v * S + K > shape.width;
  return one_of(K - (top < 0) - (top + K > shape.height)) * one_of(K - cut_left - cut_right);
}

// V neighbouring windows where the pixels themselves do not matter.
template <int K, int S, int V>
struct Shares {
  float share[V];

  template <typename T>
  __device__ Shares(const T*, int y, int x, const PoolShape& shape) {
#pragma unroll
    for (int v = 0; v < V; ++v) share[v] = share_of_window<K, S, V>(v, y * S - K / 2, x * S - K / 2, shape);
  }
};

// V neighbouring windows of K x K pixels, S apart. With more than one their centres are four pixels of a row that
// is read in one access.
template <int K, int S, int V>
struct Windows {
  static constexpr int kRadius = K / 2, kColumns = (V - 1) * S + K;
  static_assert(K == 3 && (V == 1 || V * S == 4));
  float pixels[K][kColumns];  // −∞ outside the picture
  float max[V], avg[V];
  float share[V];  // of each pixel in the average: 1 / those inside the picture

  // Those of the output pixels (y, x), (y, x + 1), …
  template <typename T>
  __device__ Windows(const T* plane, int y, int x, const PoolShape& shape) {
    const int left = x * S - kRadius, top = y * S - kRadius;
    const T* row = plane + top * shape.width + left;
#pragma unroll
    for (int ky = 0; ky < K; ++ky, row += shape.width) {
      load_row(ky, row, unsigned(top + ky) < unsigned(shape.height), left, shape);
    }
    float column_max[kColumns], column_sum[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const bool inside = in_picture(i, left, shape);
      column_max[i] = pixels[0][i], column_sum[i] = inside && top >= 0 ? pixels[0][i] : 0.f;
#pragma unroll
      for (int ky = 1; ky < K; ++ky) {
        column_max[i] = larger(column_max[i], pixels[ky][i]);
        if (inside && top + ky < shape.height) column_sum[i] += pixels[ky][i];
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      max[v] = column_max[v * S];
      float sum = column_sum[v * S];
#pragma unroll
      for (int kx = 1; kx < K; ++kx) {
        max[v] = larger(max[v], column_max[v * S + kx]);
        sum += column_sum[v * S + kx];
      }
      share[v] = share_of_window<K, S, V>(v, top, left, shape);
      avg[v] = sum * share[v];
    }
  }

  // The place in window v, row by row, of the first maximum; as in PyTorch it is the one that gets a gradient.
  __device__ int first_maximum(int v) const {
    int first = 0;
#pragma unroll
    for (int place = K * K - 1; place >= 0; --place) {
      if (!(pixels[place / K][v * S + place % K] < max[v])) first = place;
    }
    return first;
  }

 private:
  static __device__ bool is_center(int column) { return V > 1 && column >= kRadius && column < kRadius + 4; }

  static __device__ bool in_picture(int column, int left, const PoolShape& shape) {
    return is_center(column) || unsigned(left + column) < unsigned(shape.width);
  }

  template <typename T>
  __device__ void load_row(int ky, const T* row, bool inside, int left, const PoolShape& shape) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      pixels[ky][i] = -kInfinity;
      if (!is_center(i) && inside && in_picture(i, left, shape)) pixels[ky][i] = storage::load(row + i);
    }
    if (V > 1 && inside) {
      const Values<4> center = Values<4>::load(row + kRadius);
#pragma unroll
      for (int i = 0; i < 4; ++i) pixels[ky][(kRadius + i) % kColumns] = center.v[i];
    }
  }
};

}  // namespace node
