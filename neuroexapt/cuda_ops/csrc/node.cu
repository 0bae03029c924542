// Pools, BatchNorm statistics and the sum of a node; node.h has the legend.
//
// Every kernel here is bound by memory. The elementwise ones see a channel's pixels of all pictures as one row
// and give each thread `V` neighbours: four, or one where rows of 16 bytes do not fit. Where sums are taken a
// warp owns a span of that row, so a partial sum is a few registers and five shuffles, without barriers.

#include "node.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "launch.cuh"

namespace node {
namespace {

using launching::launch;

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSpan = 512;     // pixels of a part
constexpr int kInFlight = 8;   // terms whose loads a thread issues before it uses the first
constexpr int kStateThreads = 256;
constexpr int kTilePixels = 1024;
constexpr float kInfinity = __builtin_huge_valf();

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__host__ __device__ int part_count(const Shape& shape) {
  return int((int64_t(shape.batch) * shape.pixels + kSpan - 1) / kSpan);
}

template <typename T>
__device__ T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <int V>
struct Values {
  float v[V];

  __device__ static Values load(const float* source) {
    Values values;
    if constexpr (V == 4) {
      const float4 bits = __ldg(reinterpret_cast<const float4*>(source));
      values.v[0] = bits.x, values.v[1] = bits.y, values.v[2] = bits.z, values.v[3] = bits.w;
    } else {
      values.v[0] = __ldg(source);
    }
    return values;
  }

  __device__ void store(float* target) const {
    if constexpr (V == 4) {
      // An intrinsic, since the compiler splits a plain assignment into four narrow stores.
      __stwb(reinterpret_cast<float4*>(target), make_float4(v[0], v[1], v[2], v[3]));
    } else {
      target[0] = v[0];
    }
  }
};

__device__ float warp_sum(float value) {
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

  __device__ const float* in(const Tensor& tensor, int channel, const Shape& shape) const {
    return pointer<const float>(tensor.data) + picture * tensor.batch_stride + offset(channel, shape);
  }
  __device__ float* in_contiguous(Address data, int channel, const Shape& shape) const {
    return pointer<float>(data) + int64_t(picture) * shape.channels * shape.pixels + offset(channel, shape);
  }

 private:
  __device__ int64_t offset(int channel, const Shape& shape) const {
    return int64_t(channel) * shape.pixels + pixel;
  }
};

// A lane's share of a part: kSlots times V pixels.
template <int V>
struct Share {
  static constexpr int kSlots = kSpan / kWarp / V;
  Position at[kSlots];
  int count;  // slots that hold pixels are the first ones

  __device__ Share(int part, const Shape& shape) : count(0) {
    const unsigned end = unsigned(shape.batch) * shape.pixels / V;
    const unsigned first = unsigned(part) * (kSpan / V) + threadIdx.x % kWarp;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const unsigned i = first + slot * kWarp;
      at[slot] = Position::of<V>(min(i, end - 1), shape);
      count += i < end;
    }
  }

  __device__ void load(Values<V> (&values)[kSlots], const Tensor& tensor, int channel,
                       const Shape& shape) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot < count) values[slot] = Values<V>::load(at[slot].in(tensor, channel, shape));
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

struct MomentsLaunch {
  Shape shape;
  MomentsJob jobs[kMaxTerms];
};

// Grid: (parts / kWarps, channels, jobs).
template <int V>
__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ MomentsLaunch launch) {
  const Shape& shape = launch.shape;
  const MomentsJob& job = launch.jobs[blockIdx.z];
  const int part = blockIdx.x * kWarps + threadIdx.x / kWarp, channel = blockIdx.y;
  if (part >= part_count(shape)) return;
  const Share<V> share(part, shape);
  Values<V> values[Share<V>::kSlots];
  share.load(values, job.z, channel, shape);
  store_moments(pointer<float>(job.moments) + (int64_t(part) * shape.channels + channel) * 3, values,
                share.count);
}

constexpr int kMergeChannels = 16, kMergeSplits = 32;

struct StatsLaunch {
  int channels;
  float eps, momentum;
  StatsJob jobs[64];
};

// The sums that the threads of one channel hold, added in the order of the splits.
__device__ float merge(float (&shared)[kMergeSplits][kMergeChannels], float value) {
  __syncthreads();  // `shared` may still be read for the sum before
  shared[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int split = 0; split < kMergeSplits; ++split) sum += shared[split][threadIdx.x];
  return sum;
}

__device__ void store_stats(const StatsLaunch& launch, const StatsJob& job, int channel, float mean,
                            float variance) {
  pointer<float2>(job.stats)[channel] = make_float2(mean, 1.f / sqrtf(variance + launch.eps));
}

__device__ void update_running(float* running, float value, float momentum) {
  *running = fmaf(1.f - momentum, *running, momentum * value);
}

// Grid: (blocks of channels, jobs).
__global__ void __launch_bounds__(kMergeChannels* kMergeSplits)
    finalize_kernel(const __grid_constant__ StatsLaunch launch) {
  __shared__ float shared[kMergeSplits][kMergeChannels];
  const StatsJob& job = launch.jobs[blockIdx.y];
  const int channel = blockIdx.x * kMergeChannels + threadIdx.x;
  const bool stores = threadIdx.y == 0 && channel < launch.channels;
  float* running_mean = pointer<float>(job.running_mean) + channel;
  float* running_var = pointer<float>(job.running_var) + channel;
  if (job.moments == 0) {
    if (stores) store_stats(launch, job, channel, *running_mean, *running_var);
    return;
  }
  const float* moments = pointer<const float>(job.moments);
  const auto sum_over_parts = [&](auto value_of) {
    float sum = 0.f;
    if (channel < launch.channels) {
#pragma unroll 4
      for (int part = threadIdx.y; part < job.parts; part += kMergeSplits) {
        const float* m = moments + (int64_t(part) * launch.channels + channel) * 3;
        sum += value_of(__ldg(m), __ldg(m + 1), __ldg(m + 2));
      }
    }
    return merge(shared, sum);
  };
  // Chan, Golub and LeVeque's merge, of all parts at once.
  const float count = sum_over_parts([](float n, float, float) { return n; });
  const float mean = sum_over_parts([](float n, float m, float) { return n * m; }) / count;
  const float squares = sum_over_parts(
      [mean](float n, float m, float squares) { return fmaf(n * (m - mean), m - mean, squares); });
  if (!stores) return;
  store_stats(launch, job, channel, mean, squares / count);
  if (job.running_mean != 0) {
    update_running(running_mean, mean, launch.momentum);
    update_running(running_var, squares / (count - 1.f), launch.momentum);
    if (channel == 0) ++*pointer<int64_t>(job.num_batches_tracked);
  }
}

// Columns [first, first + N) of a row; those outside the picture are left as they are. Of the wide ones the four
// from `Center` on are one aligned load.
template <int V, int Center, int N>
__device__ void load_columns(float (&columns)[N], const float* row, int first, int width) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (V == 4 && i == Center) {
      const Values<V> center = Values<V>::load(row + first + i);
#pragma unroll
      for (int v = 0; v < V; ++v) columns[i + v] = center.v[v];
      i += V - 1;
    } else if (unsigned(first + i) < unsigned(width)) {
      columns[i] = __ldg(row + first + i);
    }
  }
}

// V neighbouring windows of K x K pixels, S apart.
template <int K, int S, int V>
struct Windows {
  float max[V], avg[V];
  int first_maximum[V];  // its place in the window, row by row

  // Those of the output pixels (y, x), (y, x + 1), …
  __device__ Windows(const float* plane, int y, int x, const PoolShape& shape) {
    constexpr int kRadius = K / 2, kColumns = (V - 1) * S + K;
    const int left = x * S - kRadius, top = y * S - kRadius;
    float sum[V];
    int count[V];
#pragma unroll
    for (int v = 0; v < V; ++v) max[v] = -kInfinity, sum[v] = 0.f, count[v] = 0, first_maximum[v] = -1;
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
      if (unsigned(top + ky) >= unsigned(shape.height)) continue;
      float columns[kColumns];
      load_columns<V, kRadius>(columns, plane + int64_t(top + ky) * shape.width, left, shape.width);
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
          const int column = v * S + kx;
          if (unsigned(left + column) < unsigned(shape.width)) {
            const float value = columns[column];
            sum[v] += value;
            ++count[v];
            // As in PyTorch: the first maximum wins, NaN goes before everything.
            if (value > max[v] || value != value || first_maximum[v] < 0) {
              max[v] = value;
              first_maximum[v] = ky * K + kx;
            }
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) avg[v] = sum[v] / float(count[v]);
  }
};

__host__ __device__ Shape output_shape(const PoolShape& shape) {
  return {shape.batch, shape.channels, shape.out_height * shape.out_width};
}

struct PoolLaunch {
  PoolShape shape;
  PoolJob job;
};

// Grid: (parts / kWarps, channels).
template <int K, int S, int V>
__global__ void __launch_bounds__(kThreads) pool_kernel(const __grid_constant__ PoolLaunch launch) {
  const PoolShape& shape = launch.shape;
  const PoolJob& job = launch.job;
  const Shape out = output_shape(shape);
  const int part = blockIdx.x * kWarps + threadIdx.x / kWarp, channel = blockIdx.y;
  if (part >= part_count(out)) return;
  const Share<V> share(part, out);
  Values<V> max[Share<V>::kSlots], avg[Share<V>::kSlots];
#pragma unroll
  for (int slot = 0; slot < Share<V>::kSlots; ++slot) {
    if (slot >= share.count) break;
    const Position at = share.at[slot];
    const float* plane = pointer<const float>(job.x.data) + at.picture * job.x.batch_stride +
                         int64_t(channel) * shape.height * shape.width;
    const Windows<K, S, V> windows(plane, at.pixel / shape.out_width, at.pixel % shape.out_width, shape);
#pragma unroll
    for (int v = 0; v < V; ++v) max[slot].v[v] = windows.max[v], avg[slot].v[v] = windows.avg[v];
    if (job.max != 0) max[slot].store(at.in_contiguous(job.max, channel, out));
    if (job.avg != 0) avg[slot].store(at.in_contiguous(job.avg, channel, out));
  }
  const int64_t moments = (int64_t(part) * out.channels + channel) * 3;
  if (job.max_moments != 0) store_moments(pointer<float>(job.max_moments) + moments, max, share.count);
  if (job.avg_moments != 0) store_moments(pointer<float>(job.avg_moments) + moments, avg, share.count);
}

__device__ float2 stats_of(Address stats, int channel) {
  return stats == 0 ? make_float2(0.f, 1.f) : __ldg(pointer<const float2>(stats) + channel);
}

__device__ float weight_of(Address weight) { return weight == 0 ? 1.f : __ldg(pointer<const float>(weight)); }

struct SumLaunch {
  Shape shape;
  int count;
  Tensor y;
  Term terms[kMaxTerms];
};

// Grid: (blocks of a channel's pixels, channels).
template <int V>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumLaunch launch) {
  __shared__ float2 scales[kMaxTerms];  // mean and weight · rstd
  const Shape& shape = launch.shape;
  const int channel = blockIdx.y, count = launch.count;
  const unsigned end = unsigned(shape.batch) * shape.pixels / V;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const Position at = Position::of<V>(min(i, end - 1), shape);
  Values<V> z[kInFlight];
  const auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j < count) z[j] = Values<V>::load(at.in(launch.terms[first + j].z, channel, shape));
    }
  };
  load(0);  // on its way while the scales are computed
  for (int k = threadIdx.x; k < count; k += kThreads) {
    const float2 stats = stats_of(launch.terms[k].stats, channel);
    scales[k] = make_float2(stats.x, stats.y * weight_of(launch.terms[k].weight));
  }
  __syncthreads();
  Values<V> y = {};
  for (int first = 0; first < count; first += kInFlight) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j >= count) break;
      const float2 scale = scales[first + j];
#pragma unroll
      for (int v = 0; v < V; ++v) y.v[v] = fmaf(scale.y, z[j].v[v] - scale.x, y.v[v]);
    }
    load(first + kInFlight);
  }
  if (i < end) y.store(const_cast<float*>(at.in(launch.y, channel, shape)));
}

struct DotsLaunch {
  Shape shape;
  int count;
  Tensor g;
  float* dots;
  Term terms[kMaxTerms];
};

// Grid: (parts, channels, splits); the warps of all splits take turns with the terms.
template <int V>
__global__ void __launch_bounds__(kThreads) dots_kernel(const __grid_constant__ DotsLaunch launch) {
  constexpr int kSlots = Share<V>::kSlots;
  const Shape& shape = launch.shape;
  const int part = blockIdx.x, channel = blockIdx.y;
  const Share<V> share(part, shape);
  Values<V> g[kSlots] = {};
  share.load(g, launch.g, channel, shape);
  const auto store = [&](int row, float sum) {
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) {
      launch.dots[(int64_t(row) * shape.channels + channel) * part_count(shape) + part] = sum;
    }
  };
  const int warp = blockIdx.z * kWarps + threadIdx.x / kWarp;
  if (warp == 0) {
    float sum = 0.f;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum += g[slot].v[v];
    }
    store(0, sum);
  }
#pragma unroll 2
  for (int k = warp; k < launch.count; k += gridDim.z * kWarps) {
    const Term& term = launch.terms[k];
    Values<V> z[kSlots] = {};
    share.load(z, term.z, channel, shape);
    const float mean = stats_of(term.stats, channel).x;
    float sum = 0.f;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum = fmaf(g[slot].v[v], z[slot].v[v] - mean, sum);
    }
    store(1 + k, sum);
  }
}

constexpr int kCoefficientThreads = 512;
constexpr int kCoefficientWarps = kCoefficientThreads / kWarp;

struct CoefficientsLaunch {
  int channels, parts;
  float scale;  // 1 / (B · H · W), or 0 where the statistics are constants
  const float* dots;
  TermGradient terms[kMaxTerms];
};

// Grid: terms. A warp adds up the parts of a channel.
__global__ void __launch_bounds__(kCoefficientThreads)
    coefficients_kernel(const __grid_constant__ CoefficientsLaunch launch) {
  __shared__ float by_warp[kCoefficientWarps];
  const TermGradient& term = launch.terms[blockIdx.x];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto sum_over_parts = [&](int row, int channel) {
    const float* dots = launch.dots + (int64_t(row) * launch.channels + channel) * launch.parts;
    float sum = 0.f;
#pragma unroll 4
    for (int part = lane; part < launch.parts; part += kWarp) sum += __ldg(dots + part);
    return warp_sum(sum);
  };
  const float weight = weight_of(term.weight);
  float grad_weight = 0.f;
  for (int channel = warp; channel < launch.channels; channel += kCoefficientWarps) {
    const float2 stats = stats_of(term.stats, channel);
    const float rstd = stats.y, dot = sum_over_parts(1 + blockIdx.x, channel);
    grad_weight = fmaf(dot, rstd, grad_weight);
    if (term.coef == 0) continue;
    const float scale = term.stats == 0 ? 0.f : launch.scale;
    const float slope = -weight * rstd * rstd * rstd * dot * scale;
    const float offset = -weight * rstd * sum_over_parts(0, channel) * scale - slope * stats.x;
    if (lane == 0) pointer<float4>(term.coef)[channel] = make_float4(weight * rstd, slope, offset, 0.f);
  }
  if (term.grad_weight == 0) return;
  if (lane == 0) by_warp[warp] = grad_weight;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kCoefficientWarps; ++w) sum += by_warp[w];
  *pointer<float>(term.grad_weight) = sum;
}

struct AffineLaunch {
  Shape shape;
  AffineJob jobs[64];
};

// Grid: (blocks of a channel's pixels, channels, jobs).
template <int V>
__global__ void __launch_bounds__(kThreads) affine_kernel(const __grid_constant__ AffineLaunch launch) {
  const Shape& shape = launch.shape;
  const AffineJob& job = launch.jobs[blockIdx.z];
  const int channel = blockIdx.y;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= unsigned(shape.batch) * shape.pixels / V) return;
  const Position at = Position::of<V>(i, shape);
  const Values<V> g = Values<V>::load(at.in(job.g, channel, shape));
  const Values<V> z = Values<V>::load(at.in(job.z, channel, shape));
  const float4 coef = __ldg(pointer<const float4>(job.coef) + channel);
  Values<V> dz;
#pragma unroll
  for (int v = 0; v < V; ++v) dz.v[v] = fmaf(coef.x, g.v[v], fmaf(coef.y, z.v[v], coef.z));
  dz.store(at.in_contiguous(job.dz, channel, shape));
}

struct StateLaunch {
  PoolShape shape;
  Tensor x;
  float* dx;
  int edges, addends;
  bool max, avg;  // whether there are such pools
  StateEdge edge[kMaxEdges];
  Tensor addend[kMaxAddends];
};

// The planes and rows of a block: several whole planes where they are small, else a band of one.
template <int K, int S>
struct Tile {
  int planes, rows;

  __host__ __device__ Tile(const PoolShape& shape)
      : planes(max(1, kTilePixels / (shape.height * shape.width))),
        rows(planes > 1 ? shape.height : min(shape.height, max(1, kTilePixels / shape.width))) {}

  __host__ __device__ int bands(const PoolShape& shape) const { return ceil_div(shape.height, rows); }

  // Rows of windows that reach into `rows` rows, and their number in shared memory.
  __host__ __device__ int window_rows(const PoolShape& shape) const {
    return min(shape.out_height, (rows + K - 2) / S + 1);
  }
  __host__ __device__ int windows(const PoolShape& shape) const {
    return planes * window_rows(shape) * shape.out_width;
  }
};

// What the windows pass back, in shared memory.
struct WindowGradients {
  float *max, *avg;  // avg already divided by the window's number of pixels
  unsigned char* first_maximum;

  __device__ WindowGradients(float* shared, int windows)
      : max(shared), avg(max + windows), first_maximum(reinterpret_cast<unsigned char*>(avg + windows)) {}

  __host__ __device__ static int bytes(int windows) { return windows * (2 * sizeof(float) + 1); }
};

// gradient += A · g + B · pooled + D for V windows.
template <int V>
__device__ void add_gradient(float (&gradient)[V], const Values<V>& g, Address coef_, int channel,
                             const float (&pooled)[V]) {
  if (coef_ == 0) return;
  const float4 coef = __ldg(pointer<const float4>(coef_) + channel);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    gradient[v] = fmaf(coef.x, g.v[v], gradient[v] + fmaf(coef.y, pooled[v], coef.z));
  }
}

__device__ int window_pixels(int y, int x, int radius, int stride, const PoolShape& shape) {
  const int rows = min(y * stride + radius, shape.height - 1) - max(y * stride - radius, 0) + 1;
  const int columns = min(x * stride + radius, shape.width - 1) - max(x * stride - radius, 0) + 1;
  return rows * columns;
}

// Grid: planes / Tile::planes times bands. Phase one leaves the windows' gradients in shared memory, phase two
// gathers for every pixel of x those of the windows that hold it.
template <int K, int S, int V>
__global__ void __launch_bounds__(kStateThreads, 4) state_kernel(const __grid_constant__ StateLaunch launch) {
  extern __shared__ __align__(16) float shared[];
  constexpr int kRadius = K / 2;
  const PoolShape& shape = launch.shape;
  const Tile<K, S> tile(shape);
  const int bands = tile.bands(shape), first_plane = blockIdx.x / bands * tile.planes;
  const int planes = min(tile.planes, shape.batch * shape.channels - first_plane);
  const int top = blockIdx.x % bands * tile.rows, bottom = min(shape.height, top + tile.rows);
  // The windows that reach into rows [top, bottom).
  const int first_window = max(0, (top - kRadius + S - 1) / S);
  const int window_rows = min(shape.out_height, (bottom - 1 + kRadius) / S + 1) - first_window;
  const int64_t out_plane = int64_t(shape.out_height) * shape.out_width;
  const int64_t plane_pixels = int64_t(shape.height) * shape.width;
  const WindowGradients windows(shared, tile.windows(shape));

  const int across = shape.out_width / V;
  if (launch.max || launch.avg) {
    for (int i = threadIdx.x; i < planes * window_rows * across; i += kStateThreads) {
      const int row = i / across, x = i % across * V;
      const int plane = first_plane + row / window_rows, y = first_window + row % window_rows;
      const int picture = plane / shape.channels, channel = plane % shape.channels;
      const Windows<K, S, V> pooled(
          pointer<const float>(launch.x.data) + picture * launch.x.batch_stride + channel * plane_pixels, y, x,
          shape);
      float max_gradient[V] = {}, avg_gradient[V] = {};
      for (int e = 0; e < launch.edges; ++e) {
        const StateEdge& edge = launch.edge[e];
        if (edge.max_coef == 0 && edge.avg_coef == 0) continue;
        const Values<V> g =
            Values<V>::load(pointer<const float>(edge.g.data) + picture * edge.g.batch_stride +
                            channel * out_plane + y * shape.out_width + x);
        add_gradient(max_gradient, g, edge.max_coef, channel, pooled.max);
        add_gradient(avg_gradient, g, edge.avg_coef, channel, pooled.avg);
      }
      const int target = row * shape.out_width + x;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        windows.max[target + v] = max_gradient[v];
        windows.avg[target + v] = avg_gradient[v] / float(window_pixels(y, x + v, kRadius, S, shape));
        windows.first_maximum[target + v] = pooled.first_maximum[v];
      }
    }
    __syncthreads();
  }

  const int rows = bottom - top, x_across = shape.width / V;
  for (int i = threadIdx.x; i < planes * rows * x_across; i += kStateThreads) {
    const int row = i / x_across, x = i % x_across * V;
    const int plane = first_plane + row / rows, y = top + row % rows;
    const int picture = plane / shape.channels, channel = plane % shape.channels;
    const int64_t pixel = channel * plane_pixels + int64_t(y) * shape.width + x;
    Values<V> dx = {};
    const auto add = [&](const Tensor& tensor, float weight) {
      const Values<V> values =
          Values<V>::load(pointer<const float>(tensor.data) + picture * tensor.batch_stride + pixel);
#pragma unroll
      for (int v = 0; v < V; ++v) dx.v[v] = fmaf(weight, values.v[v], dx.v[v]);
    };
#pragma unroll 2
    for (int a = 0; a < launch.addends; ++a) add(launch.addend[a], 1.f);
    for (int e = 0; e < launch.edges; ++e) {
      const StateEdge& edge = launch.edge[e];
      if (edge.identity_weight != 0) add(edge.g, weight_of(edge.identity_weight));
    }
    if (launch.max || launch.avg) {
      const int window_plane = row / rows * window_rows - first_window;
#pragma unroll
      for (int ky = 0; ky < K; ++ky) {
        const int window_y = y + kRadius - ky;  // times S
        if (window_y < 0 || window_y % S != 0 || window_y / S >= shape.out_height) continue;
        const int window_row = (window_plane + window_y / S) * shape.out_width;
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const int window_x = x + v + kRadius - kx;
            if (window_x < 0 || window_x % S != 0 || window_x / S >= shape.out_width) continue;
            const int window = window_row + window_x / S;
            dx.v[v] += windows.avg[window];
            if (windows.first_maximum[window] == ky * K + kx) dx.v[v] += windows.max[window];
          }
        }
      }
    }
    dx.store(launch.dx + int64_t(picture) * shape.channels * plane_pixels + pixel);
  }
}

bool wide(Address data) { return data % 16 == 0; }
bool wide(const Tensor& tensor) { return wide(tensor.data) && tensor.batch_stride % 4 == 0; }

template <typename Items, typename Tensor_>
bool all_wide(const Items& items, Tensor_ tensor) {
  return std::all_of(items.begin(), items.end(), [&](const auto& item) { return wide(tensor(item)); });
}

// Calls f with the number of neighbours that a thread takes.
template <typename F>
void with_width(bool is_wide, F f) {
  if (is_wide) f(std::integral_constant<int, 4>());
  else f(std::integral_constant<int, 1>());
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

int blocks_of(const Shape& shape, int neighbours) {
  return int((int64_t(shape.batch) * shape.pixels / neighbours + kThreads - 1) / kThreads);
}

// Calls f with window size and stride; they are wide where rows of 16 bytes fit.
template <typename F>
void with_windows(const PoolShape& shape, bool is_wide, F f) {
  const auto with_stride = [&](auto size) {
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 4> four;
    if (shape.stride == 2) f(size, std::integral_constant<int, 2>(), one);
    else if (is_wide && shape.width % 4 == 0) f(size, one, four);
    else f(size, one, one);
  };
  if (shape.stride != 1 && shape.stride != 2) throw std::invalid_argument("pools take stride 1 or 2");
  switch (shape.kernel_size) {
    case 3: return with_stride(std::integral_constant<int, 3>());
    default: throw std::invalid_argument("pools take windows of 3 pixels");
  }
}

}  // namespace

int parts(const Shape& shape) { return part_count(shape); }

int pool_parts(const PoolShape& shape) { return parts(output_shape(shape)); }

void plane_moments(const Shape& shape, const std::vector<MomentsJob>& jobs, Address stream) {
  const bool is_wide = shape.pixels % 4 == 0 && all_wide(jobs, [](const MomentsJob& job) { return job.z; });
  MomentsLaunch parameters{shape, {}};
  in_batches(jobs, kMaxTerms, [&](size_t first, size_t count) {
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    with_width(is_wide, [&](auto V) {
      launch(moments_kernel<V()>, dim3(ceil_div(parts(shape), kWarps), shape.channels, count), kThreads, 0, stream,
             parameters);
    });
  });
}

void finalize(int channels, float eps, float momentum, const std::vector<StatsJob>& jobs, Address stream) {
  StatsLaunch parameters{channels, eps, momentum, {}};
  in_batches(jobs, std::size(parameters.jobs), [&](size_t first, size_t count) {
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    launch(finalize_kernel, dim3(ceil_div(channels, kMergeChannels), count), dim3(kMergeChannels, kMergeSplits), 0,
           stream, parameters);
  });
}

void pool(const PoolShape& shape, const PoolJob& job, Address stream) {
  with_windows(shape, wide(job.x) && wide(job.max) && wide(job.avg), [&](auto K, auto S, auto V) {
    launch(pool_kernel<K(), S(), V()>, dim3(ceil_div(pool_parts(shape), kWarps), shape.channels), kThreads, 0,
           stream, PoolLaunch{shape, job});
  });
}

void sum(const Shape& shape, const std::vector<Term>& terms, Tensor y, Address stream) {
  const bool is_wide =
      shape.pixels % 4 == 0 && wide(y) && all_wide(terms, [](const Term& term) { return term.z; });
  SumLaunch parameters{shape, int(terms.size()), y, {}};
  copy_into(parameters.terms, terms, "too many terms in one node");
  with_width(is_wide, [&](auto V) {
    launch(sum_kernel<V()>, dim3(blocks_of(shape, V()), shape.channels), kThreads, 0, stream, parameters);
  });
}

void dots(const Shape& shape, const std::vector<Term>& terms, Tensor g, Address dots, Address stream) {
  const bool is_wide =
      shape.pixels % 4 == 0 && wide(g) && all_wide(terms, [](const Term& term) { return term.z; });
  DotsLaunch parameters{shape, int(terms.size()), g, reinterpret_cast<float*>(dots), {}};
  copy_into(parameters.terms, terms, "too many terms in one node");
  constexpr int kWantedBlocks = 1024;  // about eight for each of 132 multiprocessors
  const int blocks = parts(shape) * shape.channels;
  const int most_splits = std::max(1, ceil_div(terms.size(), kWarps));
  const int splits = std::clamp(ceil_div(kWantedBlocks, blocks), 1, most_splits);
  with_width(is_wide, [&](auto V) {
    launch(dots_kernel<V()>, dim3(parts(shape), shape.channels, splits), kThreads, 0, stream, parameters);
  });
}

void coefficients(const Shape& shape, bool training, const std::vector<TermGradient>& terms, Address dots,
                  Address stream) {
  const float count = float(shape.batch) * shape.pixels;
  CoefficientsLaunch parameters{shape.channels, parts(shape), training ? 1.f / count : 0.f,
                                reinterpret_cast<const float*>(dots), {}};
  copy_into(parameters.terms, terms, "too many terms in one node");
  launch(coefficients_kernel, dim3(terms.size()), kCoefficientThreads, 0, stream, parameters);
}

void affine_gradient(const Shape& shape, const std::vector<AffineJob>& jobs, Address stream) {
  const bool is_wide = shape.pixels % 4 == 0 && all_wide(jobs, [](const AffineJob& job) { return job.g; }) &&
                       all_wide(jobs, [](const AffineJob& job) { return job.z; });
  AffineLaunch parameters{shape, {}};
  in_batches(jobs, std::size(parameters.jobs), [&](size_t first, size_t count) {
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    with_width(is_wide, [&](auto V) {
      launch(affine_kernel<V()>, dim3(blocks_of(shape, V()), shape.channels, count), kThreads, 0, stream,
             parameters);
    });
  });
}

void state_gradient(const PoolShape& shape, Tensor x, const std::vector<StateEdge>& edges,
                    const std::vector<Tensor>& addends, Address dx, Address stream) {
  const bool is_wide = wide(x) && all_wide(edges, [](const StateEdge& edge) { return edge.g; }) &&
                       all_wide(addends, [](const Tensor& addend) { return addend; });
  StateLaunch parameters{shape, x, reinterpret_cast<float*>(dx), int(edges.size()), int(addends.size())};
  copy_into(parameters.edge, edges, "too many edges leave one state");
  copy_into(parameters.addend, addends, "too many addends in one state's gradient");
  for (const StateEdge& edge : edges) {
    parameters.max |= edge.max_coef != 0;
    parameters.avg |= edge.avg_coef != 0;
  }
  with_windows(shape, is_wide, [&](auto K, auto S, auto V) {
    const Tile<K(), S()> tile(shape);
    const int groups = ceil_div(shape.batch * shape.channels, tile.planes);
    launch(state_kernel<K(), S(), V()>, dim3(groups * tile.bands(shape)), kStateThreads,
           WindowGradients::bytes(tile.windows(shape)), stream, parameters);
  });
}

}  // namespace node
