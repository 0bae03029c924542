// What the forward and backward convolution stages of a fused cell share: tiles, windows, matrix products.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "arithmetic.cuh"
#include "async_copy.cuh"
#include "cell_conv.h"
#include "launch.cuh"
#include "tensor_core.cuh"
#include "tiles.cuh"

namespace cell_conv {
namespace {

using arithmetic::ceil_div;
using async_copies::copy4_async;
using async_copies::copy8_async;
using async_copies::wait_for_copies;
using launching::check;
using launching::launch;
using launching::launch_early;
using tensor_core::Fragment;
using tensor_core::multiply;
using tensor_core::multiply_strip;
using tensor_core::sum_over_quad;
using tensor_core::sums_over_quad;
using tensor_core::unbiased;
using namespace tiles;

constexpr int kHalo = 4;  // columns beside a tile: what a 5 x 5 of dilation 2 reads; rows are as many as needed

// A tile of a picture: Rows x Width pixels of all channels. Wider for fewer channels, so that shared memory
// holds it and a search network's usual pictures (32 pixels at 16 channels, 16 at 32, 8 at 64) fill it.
template <int C>
struct Tile {
  static constexpr int kWidth = 512 / C;
  static constexpr int kRows = C == 32 ? 16 : 8;
  static constexpr int kRunsPerRow = kWidth / 8;
  static constexpr int kRuns = kRows * kRunsPerRow;  // of eight neighbouring pixels

  __host__ __device__ static int across(const Shape& shape) { return ceil_div(shape.width, kWidth); }
  __host__ __device__ static int down(const Shape& shape) { return ceil_div(shape.height, kRows); }
};

// Where a block's tile lies, and its rows in shared memory. Rows outside the picture are all one row of
// zeros. There is always room for it: where the halo is complete, no row lies outside.
template <int C>
struct Place {
  int pad, picture, y0, x0;
  int first, rows;  // the tile's rows with halo that lie inside the picture

  __device__ Place(const Shape& shape, int pad_) : pad(pad_) {  // rows above and below the tile
    const int across = Tile<C>::across(shape), down = Tile<C>::down(shape);
    picture = blockIdx.x / (across * down);
    const int tile = blockIdx.x % (across * down);
    y0 = tile / across * Tile<C>::kRows;
    x0 = tile % across * Tile<C>::kWidth;
    first = max(0, y0 - pad);
    rows = min(shape.height, y0 + Tile<C>::kRows + pad) - first;
  }

  // The stored row of the picture's row y.
  __device__ int stored(int y) const {
    const unsigned row = y - first;
    return min(row, unsigned(rows));
  }
};

template <int C>
__host__ __device__ int stored_rows(const Shape& shape, int pad) {
  return min(Tile<C>::kRows + 2 * pad, shape.height + 1);
}

template <int C>
int tile_count(const Shape& shape) {
  return shape.batch * Tile<C>::across(shape) * Tile<C>::down(shape);
}

// As in PyTorch, NaN passes.
__device__ inline float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// Four neighbours of a row from column x on; zeros past its end.
template <typename T>
__device__ inline float4 load_row4(const T* row, int x, int width, bool aligned) {
  if (aligned && x + 4 <= width) return load4(row + x);
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (x < width) v.x = storage::load(row + x);
  if (x + 1 < width) v.y = storage::load(row + x + 1);
  if (x + 2 < width) v.z = storage::load(row + x + 2);
  if (x + 3 < width) v.w = storage::load(row + x + 3);
  return v;
}

template <typename T>
__device__ inline void store_row4(T* row, int x, int width, bool aligned, float4 v) {
  if (aligned && x + 4 <= width) return store4(row + x, v);
  if (x < width) storage::store(row + x, v.x);
  if (x + 1 < width) storage::store(row + x + 1, v.y);
  if (x + 2 < width) storage::store(row + x + 2, v.z);
  if (x + 3 < width) storage::store(row + x + 3, v.w);
}

// Whether every row of every plane starts at a multiple of four pixels.
__device__ inline bool rows_aligned(const void* base, int64_t batch_stride, int width) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && batch_stride % 4 == 0 && width % 4 == 0;
}

// The input of a convolution, as it is read: relu(x) or relu((x − mean) · rstd).
template <typename T>
struct Source {
  const T* x;
  const float2* stats;
  bool aligned;

  __device__ Source(Address x_, int64_t batch_stride, Address stats_, const Shape& shape, int picture)
      : x(reinterpret_cast<const T*>(x_) + picture * batch_stride),
        stats(reinterpret_cast<const float2*>(stats_)),
        aligned(rows_aligned(reinterpret_cast<const void*>(x_), batch_stride, shape.width)) {}

  __device__ float mean(int channel) const { return stats == nullptr ? 0.f : __ldg(stats + channel).x; }

  __device__ float4 activate(float4 v, int channel) const {
    if (stats != nullptr) {
      const float2 m = __ldg(stats + channel);
      v.x = (v.x - m.x) * m.y, v.y = (v.y - m.x) * m.y, v.z = (v.z - m.x) * m.y, v.w = (v.w - m.x) * m.y;
    }
    return make_float4(relu(v.x), relu(v.y), relu(v.z), relu(v.w));
  }
};

// Four activated neighbours from column x on, of a row and a channel of the picture; zeros past the row's end.
template <typename T>
__device__ inline float4 load_activated(const Source<T>& source, const T* row, int x, int width, int channel) {
  float4 v = source.activate(load_row4(row, x, width, false), channel);
  if (x + 1 >= width) v.y = 0.f;
  if (x + 2 >= width) v.z = 0.f;
  if (x + 3 >= width) v.w = 0.f;
  return v;
}

// The activated tile with its halo into shared memory, `pitch` floats a row and `plane` a channel; channel c goes
// to slot(c). What lies outside the picture is zero: padding comes after the normalisation. A thread takes a place
// and every kGroups-th channel, so that all of their addresses differ by constants.
template <int C, int Threads, typename T, typename Slot>
__device__ void load_tile(float* tile, const Source<T>& source, const Place<C>& at, const Shape& shape, int pitch,
                          int plane, Slot slot) {
  constexpr int kQuads = Tile<C>::kWidth / 4;
  const int width = shape.width, picture_plane = shape.height * width;
  const auto copy = [&](int row, int quad, auto groups, int first, auto loads) {  // so many in flight
    constexpr int kGroups = decltype(groups)::value, kMost = decltype(loads)::value;
    constexpr int kBatch = C / kGroups < kMost ? C / kGroups : kMost;
    const int x = at.x0 + 4 * quad;
    const bool inside = row < at.rows && 0 <= x && x < width;
    const T* from = source.x + first * picture_plane + (at.first + row) * width;
    float* to = tile + slot(first) * plane + row * pitch + kHalo + 4 * quad;
#pragma unroll
    for (int i = 0; i < C / kGroups; i += kBatch) {
      float4 v[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) v[j] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (inside && source.aligned) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) v[j] = load4(from + (i + j) * kGroups * picture_plane + x);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) v[j] = source.activate(v[j], first + (i + j) * kGroups);
      } else if (inside) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int channel = (i + j) * kGroups;
          v[j] = load_activated(source, from + channel * picture_plane, x, width, first + channel);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) *reinterpret_cast<float4*>(to + slot((i + j) * kGroups) * plane) = v[j];
    }
  };
  const unsigned thread = thread_index(), lane = thread % 32, warp = thread / 32;
  constexpr int kPlaces = C == 16 ? 128 : C == 32 ? 64 : 16;
  for (unsigned place = thread % kPlaces; place < at.rows * kQuads; place += kPlaces) {
    copy(place / kQuads, place % kQuads, std::integral_constant<int, Threads / kPlaces>(), thread / kPlaces,
         std::integral_constant<int, 16>());
  }
  // The columns beside it, a place a lane, and the row of zeros, where there is one.
  const auto copy_by_warps = [&](int row, int quad) {
    copy(row, quad, std::integral_constant<int, Threads / 32>(), warp, std::integral_constant<int, 4>());
  };
  for (unsigned place = lane; place < at.rows * 2; place += 32) copy_by_warps(place / 2, place % 2 ? kQuads : -1);
  if (at.rows < stored_rows<C>(shape, at.pad) && lane < kQuads + 2) copy_by_warps(at.rows, lane - 1);
}

// Pixels [-Pad, N + Pad) around a strip of N, at window[kHalo - Pad ...]; `strip` points at pixel -kHalo.
template <int Pad, int N>
__device__ void load_window(float (&window)[N + 2 * kHalo], const float* strip) {
#pragma unroll
  for (int i = Pad > 2 ? 0 : 4; i < (Pad > 2 ? N + 8 : N + 4); i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(strip + i);
    window[i] = v.x, window[i + 1] = v.y, window[i + 2] = v.z, window[i + 3] = v.w;
  }
  if constexpr (Pad <= 2) {
    const float2 left = *reinterpret_cast<const float2*>(strip + 2);
    const float2 right = *reinterpret_cast<const float2*>(strip + N + 4);
    window[2] = left.x, window[3] = left.y, window[N + 4] = right.x, window[N + 5] = right.y;
  }
}

// Sends a convolution's depthwise weights to shared memory; wait_for_copies() tells when they are there. A warp has every
// kWarps-th channel, a lane one tap of each.
template <int C, int Threads, typename Slot>
__device__ void copy_taps(float* taps, const float* depthwise, int kernel_size, Slot slot) {
  constexpr int kWarps = Threads / 32;
  const int count = kernel_size * kernel_size, warp = thread_index() / 32, lane = thread_index() % 32;
  if (lane >= count) return;
  depthwise += warp * count + lane;
  taps += kernel_size == 5 ? tap_position(lane, 5) : tap_position(lane, 3);
#pragma unroll
  for (int n = 0; n < C; n += kWarps) copy4_async(taps + slot(warp + n) * kTapsPitch, depthwise + n * count, true);
}

// The slot of shared memory of a channel that is contracted: lane q of four takes the channels 16n + 4q + i, so its
// weights lie side by side, and their slots are 16n + 4i + q, so the four lanes read neighbouring ones. Its own inverse.
__device__ inline int contraction_slot(int channel) {
  return (channel & ~15) | (channel & 3) << 2 | (channel >> 2 & 3);
}

template <int kSize_, int kDilation_>
struct Kind {
  static constexpr int kSize = kSize_, kDilation = kDilation_, kPad = kDilation * (kSize / 2);
};

// Calls f with the Kind of a convolution. Only what must be unrolled for it belongs into f: the instruction cache
// has to hold all four.
template <typename F>
__device__ void with_kind(int kernel_size, int dilation, F f) {
  switch (kernel_size * 2 + dilation) {
    case 7: return f(Kind<3, 1>());
    case 8: return f(Kind<3, 2>());
    case 11: return f(Kind<5, 1>());
    default: return f(Kind<5, 2>());
  }
}

// Calls f with the channels as a compile-time constant.
template <typename F>
auto with_channels(const Shape& shape, F f) {
  switch (shape.channels) {
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
    case 64: return f(std::integral_constant<int, 64>());
    default: throw std::invalid_argument("the cell's convolutions take 16, 32 or 64 channels");
  }
}

}  // namespace
}  // namespace cell_conv
