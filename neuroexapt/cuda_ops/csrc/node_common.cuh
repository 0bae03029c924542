// What the kernels around a cell's convolutions share; node.h has the legend.
//
// All of them are bound by memory. The elementwise ones see a channel's pixels of all pictures as one row and give
// each thread `V` neighbours: four or two, or one where such rows do not fit. Where sums are taken a warp owns a
// span of that row, so a partial sum is a few registers and five shuffles, without barriers.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "arithmetic.cuh"
#include "launch.cuh"
#include "node.h"
#include "storage.cuh"

namespace node {

using arithmetic::ceil_div;
using launching::launch;
using launching::launch_early;
using storage::with_storage;

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSpan = 512;  // pixels of a part
constexpr float kInfinity = __builtin_huge_valf();

__host__ __device__ inline int part_count(const Shape& shape, int span = kSpan) {
  return int((int64_t(shape.batch) * shape.pixels + span - 1) / span);
}

// Divides numbers below 2^31 in a multiplication and a shift.
struct Divisor {
  unsigned divisor, factor;
  int shift = 31;

  explicit Divisor(unsigned divisor) : divisor(divisor) {
    while ((uint64_t(1) << (shift - 31)) < divisor) ++shift;
    factor = unsigned(((uint64_t(1) << shift) + divisor - 1) / divisor);
  }

  __device__ unsigned divide(unsigned n) const { return unsigned(uint64_t(n) * factor >> shift); }
  __device__ unsigned remainder(unsigned n) const { return n - divide(n) * divisor; }
};

template <typename T>
__device__ T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <int V>
struct Values {
  float v[V];

  template <typename T>
  __device__ static Values load(const T* source) {
    Values values;
    if constexpr (V == 4) {
      const float4 bits = storage::load4(source);
      values.v[0] = bits.x, values.v[1] = bits.y, values.v[2] = bits.z, values.v[3] = bits.w;
    } else if constexpr (V == 2) {
      const float2 bits = storage::load2(source);
      values.v[0] = bits.x, values.v[1] = bits.y;
    } else {
      values.v[0] = storage::load(source);
    }
    return values;
  }

  template <typename T>
  __device__ void store(T* target) const {
    if constexpr (V == 4) storage::store4(target, make_float4(v[0], v[1], v[2], v[3]));
    else if constexpr (V == 2) storage::store2(target, make_float2(v[0], v[1]));
    else storage::store(target, v[0]);
  }
};

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Where V neighbouring pixels of a channel lie.
struct Position {
  int picture, pixel;

  // The i-th V pixels of a channel in the order of the pictures.
  template <int V>
  static __device__ Position of(unsigned i, const Shape& shape) {
    const unsigned per_plane = unsigned(shape.pixels) / V;
    const unsigned picture = i / per_plane;
    return {int(picture), int(i - picture * per_plane) * V};
  }
  template <int V>
  static __device__ Position of(unsigned i, const Divisor& per_plane) {
    const unsigned picture = per_plane.divide(i);
    return {int(picture), int(i - picture * per_plane.divisor) * V};
  }

  template <typename T>
  __device__ T* in(const Tensor& tensor, int channel, const Shape& shape) const {
    return pointer<T>(tensor.data) + picture * tensor.batch_stride + offset(channel, shape);
  }
  template <typename T>
  __device__ T* in_contiguous(Address data, int channel, const Shape& shape) const {
    return pointer<T>(data) + int64_t(picture) * shape.channels * shape.pixels + offset(channel, shape);
  }

 private:
  __device__ int64_t offset(int channel, const Shape& shape) const {
    return int64_t(channel) * shape.pixels + pixel;
  }
};

// A lane's share of a part of Span pixels: kSlots times V pixels.
template <int V, int Span = kSpan>
struct Share {
  static constexpr int kSlots = Span / kWarp / V;
  Position at[kSlots];
  int count;  // slots that hold pixels are the first ones

  __device__ Share(int part, const Shape& shape) : Share(part, shape, shape) {}

  // `planes` tells where one picture ends and the next begins: the shape, or what divides by a plane's V pixels.
  template <typename Planes>
  __device__ Share(int part, const Shape& shape, const Planes& planes) : count(0) {
    const unsigned end = unsigned(shape.batch) * shape.pixels / V;
    const unsigned first = unsigned(part) * (Span / V) + threadIdx.x % kWarp;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const unsigned i = first + slot * kWarp;
      at[slot] = Position::of<V>(min(i, end - 1), planes);
      count += i < end;
    }
  }

  template <typename T>
  __device__ void load(Values<V> (&values)[kSlots], const Tensor& tensor, int channel, const Shape& shape) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot < count) values[slot] = Values<V>::load(at[slot].template in<const T>(tensor, channel, shape));
    }
  }
};

// Moments of a warp's values, of which `count` slots a lane are there.
template <int V, int Slots>
__device__ void store_moments(float* target, const Values<V> (&values)[Slots], int count) {
  float sum = 0.f;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum += slot < count ? values[slot].v[v] : 0.f;
  }
  const float total = warp_sum(float(count * V)), mean = warp_sum(sum) / total;
  float squares = 0.f;
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float deviation = values[slot].v[v] - mean;
      if (slot < count) squares = fmaf(deviation, deviation, squares);
    }
  }
  squares = warp_sum(squares);
  if (threadIdx.x % kWarp == 0) target[0] = total, target[1] = mean, target[2] = squares;
}

__device__ inline float2 stats_of(Address stats, int channel) {
  return stats == 0 ? make_float2(0.f, 1.f) : __ldg(pointer<const float2>(stats) + channel);
}

__device__ inline float weight_of(Address weight) { return weight == 0 ? 1.f : __ldg(pointer<const float>(weight)); }

inline bool wide(Address data) { return data % 16 == 0; }
inline bool wide(const Tensor& tensor) { return wide(tensor.data) && tensor.batch_stride % 4 == 0; }

template <typename Items, typename Tensor_>
bool all_wide(const Items& items, Tensor_ tensor) {
  return std::all_of(items.begin(), items.end(), [&](const auto& item) { return wide(tensor(item)); });
}

// Calls f with the Type that pictures are stored as and the number of neighbours that a thread takes.
template <typename F>
void with_variant(bool is_bf16, bool is_wide, F f) {
  with_storage(is_bf16, [&](auto storage) {
    if (is_wide) f(storage, std::integral_constant<int, 4>());
    else f(storage, std::integral_constant<int, 1>());
  });
}

// Calls f(first, jobs of this launch) as often as it takes to run all jobs.
template <typename Jobs, typename F>
void in_batches(const Jobs& jobs, size_t most, F f) {
  for (size_t first = 0; first < jobs.size(); first += most) f(first, std::min(jobs.size() - first, most));
}

template <typename Job, size_t N>
void copy_into(Job (&target)[N], const std::vector<Job>& jobs, const char* what) {
  if (jobs.size() > N) throw std::invalid_argument(what);
  std::copy(jobs.begin(), jobs.end(), target);
}

inline int blocks_of(const Shape& shape, int neighbours) {
  return int((int64_t(shape.batch) * shape.pixels / neighbours + kThreads - 1) / kThreads);
}

}  // namespace node
