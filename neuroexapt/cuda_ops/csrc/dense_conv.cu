// 1x1 and 3x3 convolutions of relu(x) on the tensor cores; dense_conv.h has the legend.
//
// A block has a tile of one picture with its halo in shared memory, all channels of it, and with that the weights of
// up to 32 output channels of one convolution after the other. A product of 16 output channels by 8 neighbouring pixels
// contracts 8 input channels at one tap, so every tap reads the same tile at another offset. Distances between channels
// and between weights are such that the lanes of a load meet in no bank.
// The input's gradient is the same with dz, formed as g and z are read, for the input and the weights transposed; a
// block goes from one convolution to the next and keeps its sums in registers. The weight's gradient contracts pixels:
// a block goes through some tiles for 16 input channels, a warp for 8 of them and one row of taps.

#include "dense_conv.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "arithmetic.cuh"
#include "async_copy.cuh"
#include "drawn.cuh"
#include "launch.cuh"
#include "storage.cuh"
#include "tensor_core.cuh"
#include "tiles.cuh"

namespace dense_conv {
namespace {

using arithmetic::ceil_div;
using arithmetic::relu;
using async_copies::copy4_async;
using async_copies::copy_async;
using async_copies::wait_for_copies;
using drawn::runs;
using launching::kMultiprocessors;
using launching::launch;
using storage::input;
using storage::load2;
using storage::load4;
using storage::output;
using storage::store2;
using storage::store4;
using tensor_core::Fragment;
using tensor_core::multiply;
using tensor_core::sum_over_quad;
using tensor_core::unbiased;
using tiles::pad_to_bank;

// A tile in shared memory: rows of `kPitch` floats, whose pixels begin at the fourth. The pixel left of a row comes
// right before it, the one that is right of it takes the first place of the next row.
template <int C>
struct Tile {
  static constexpr int kRows = 8, kColumns = 512 / C;
  static constexpr int kPitch = kColumns + 4, kHaloed = (kRows + 2) * kPitch;
  static constexpr int kEnd = 4;  // past the last plane

  __device__ static int place(int row, int column) { return (row + 1) * kPitch + 4 + column; }
};

template <int C>
int tiles_of(const Shape& shape) {
  return shape.batch * ceil_div(shape.height, Tile<C>::kRows) * ceil_div(shape.width, Tile<C>::kColumns);
}

// Where a tile lies.
template <int C>
struct Place {
  int picture, y, x;

  __device__ Place(const Shape& shape, int tile) {
    const int across = ceil_div(shape.width, Tile<C>::kColumns), down = ceil_div(shape.height, Tile<C>::kRows);
    picture = tile / (across * down);
    y = tile / across % down * Tile<C>::kRows;
    x = tile % across * Tile<C>::kColumns;
  }

  __device__ int pixels_inside(const Shape& shape) const {
    return min(shape.height - y, Tile<C>::kRows) * min(shape.width - x, Tile<C>::kColumns);
  }
};

// A thread's part in filling `shared` [kChannels, kPlane] with a tile and kHalo pixels around it, zeros outside the
// picture: four pixels of every kAtOnce-th channel. They come by copies that are not waited for (of bf16 that are), and
// are replaced in shared memory by the thread that copied them.
template <int C, int kChannels, int kPlane, int kHalo, int kThreads>
struct Filling {
  static constexpr int kQuads = Tile<C>::kColumns / 4 + 2 * kHalo, kQuadsOfTile = kQuads * (Tile<C>::kRows + 2 * kHalo);
  static constexpr int kAtOnce = kThreads / kQuadsOfTile;
  int first;  // of the channels
  bool left, right, inside;
  int64_t plane, offset;
  float* target;

  __device__ Filling(float* shared, const Shape& shape, const Place<C>& place) {
    const int quad = threadIdx.x % kQuads - kHalo, row = threadIdx.x % kQuadsOfTile / kQuads - kHalo;
    const int y = place.y + row, x = place.x + 4 * quad;
    first = threadIdx.x / kQuadsOfTile;
    if (first >= kAtOnce) first = kChannels;
    left = kHalo && quad < 0, right = kHalo && quad == Tile<C>::kColumns / 4;
    inside = unsigned(y) < unsigned(shape.height) && unsigned(x) < unsigned(shape.width);
    plane = shape.height * shape.width, offset = y * shape.width + x;
    target = shared + Tile<C>::place(row, 4 * quad);
  }

  // `picture`: that of the first channel.
  template <typename T>
  __device__ void copy(const T* picture) const {
    const T* source = picture + offset;
#pragma unroll 4
    for (int c = first; c < kChannels; c += kAtOnce) {
      if (left) copy4_async(target + c * kPlane + 3, source + c * plane + 3, inside);
      else if (right) copy4_async(target + c * kPlane, source + c * plane, inside);
      else copy_async(target + c * kPlane, source + c * plane, inside);
    }
  }

  // Calls f(v, i) for the places v of the thread's pixels of channel c, which are number i of four.
  template <typename F>
  __device__ void replace(int c, F f) const {
    float* places = target + c * kPlane;
    if (left) {
      places[3] = f(places[3], 3);
    } else if (right) {
      places[0] = f(places[0], 0);
    } else {
      const float4 v = *reinterpret_cast<const float4*>(places);
      *reinterpret_cast<float4*>(places) = make_float4(f(v.x, 0), f(v.y, 1), f(v.z, 2), f(v.w, 3));
    }
  }

  // Makes relu(x) of x.
  __device__ void activate() const {
    wait_for_copies();
    if (!inside) return;
#pragma unroll 4
    for (int c = first; c < kChannels; c += kAtOnce) {
      replace(c, [](float x, int) { return relu(x); });
    }
  }

  // Makes dz of g.
  template <typename T>
  __device__ void differentiate(const GradJob& job, int picture) const {
    constexpr int kInFlight = 8;
    if (!inside) return;
    const T* z = input<T>(job.z) + int64_t(picture) * C * plane + offset;
#pragma unroll 1
    for (int channel = first; channel < kChannels; channel += kInFlight * kAtOnce) {
      float4 zs[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int c = channel + i * kAtOnce;
        if (c < kChannels) zs[i] = load4(z + c * plane);
      }
      wait_for_copies();
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int c = channel + i * kAtOnce;
        if (c >= kChannels) break;
        const float4 coef = load4(input(job.coef) + 4 * c), of_z = zs[i];
        replace(c, [&](float g, int k) {
          const float own = k == 0 ? of_z.x : k == 1 ? of_z.y : k == 2 ? of_z.z : of_z.w;
          return fmaf(coef.x, g, fmaf(coef.y, own, coef.z));
        });
      }
    }
  }
};

// Copies rows of kFloats floats, which lie `distance` apart in memory and kPitch apart in shared memory.
template <int kRows, int kFloats, int kPitch, int kThreads>
__device__ void copy_rows_async(float* shared, const float* source, int distance) {
  constexpr int kQuads = kFloats / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kQuads; i += kThreads) {
    const int row = i / kQuads, quad = i % kQuads;
    copy_async(shared + row * kPitch + 4 * quad, source + row * distance + 4 * quad, true);
  }
}

// What the products with pixels have in common: groups of warps with two rows of the tile each, that share the
// channels which go in where a tile has few pixels, and up to 32 of the channels that come out.
template <int C>
struct Block {
  static constexpr int kGroups = 4, kShares = C < 32 ? 1 : 2, kThreads = 32 * kGroups * kShares;
  static constexpr int kChannels = C / kShares;  // of a warp
  static constexpr int kOut = C < 32 ? C : 32, kSlices = C / kOut;
  static constexpr int kPlane = pad_to_bank(Tile<C>::kHaloed, 8);  // for lanes that read four channels of eight pixels
  static constexpr int kTileFloats = C * kPlane + Tile<C>::kEnd;
  static constexpr int kAcross = Tile<C>::kColumns / 8, M = kOut / 16, N = 2 * kAcross;

  __device__ static int group() { return threadIdx.x / 32 % kGroups; }
  __device__ static int share() { return threadIdx.x / 32 / kGroups; }
  __device__ static int row(int n) { return group() * 2 + n / kAcross; }
  __device__ static int column(int n) { return n % kAcross * 8; }
};

template <int C>
using Sums = float[Block<C>::M][Block<C>::N][4];

// How many operands of a product with relu(x) the tensor cores cut digits off.
template <typename T>
constexpr int kOperandsCut = std::is_same_v<T, float> ? 2 : 1;

// sums += W · tile at one tap, for the warp's share. `left`: the weight of the lane's first output and input channel,
// others kOutStep and kInStep from there; `right`: the pixel of that input channel that the tap brings to the first.
template <int C, int kOutStep, int kInStep, bool kExact, int kCut>
__device__ void add_tap(Sums<C>& sums, const float* left, const float* right) {
  using B = Block<C>;
#pragma unroll 2
  for (int channel = 0; channel < B::kChannels; channel += 8) {
    Fragment<4, kExact> weights[B::M];
#pragma unroll
    for (int m = 0; m < B::M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = left[(m * 16 + i % 2 * 8) * kOutStep + (channel + i / 2 * 4) * kInStep];
        weights[m].set_cut(i, unbiased<kExact, kCut>(weight));
      }
    }
#pragma unroll
    for (int n = 0; n < B::N; ++n) {
      const float* pixels = right + channel * B::kPlane + n / B::kAcross * Tile<C>::kPitch + B::column(n);
      Fragment<2, kExact> values;
#pragma unroll
      for (int i = 0; i < 2; ++i) values.set_cut(i, pixels[i * 4 * B::kPlane]);
#pragma unroll
      for (int m = 0; m < B::M; ++m) multiply<kExact>(sums[m][n], weights[m], values);
    }
  }
}

// Adds the sums of the other share to those of the first. Shared memory: float4 [M, N, lanes of a share].
template <int C>
__device__ void add_shares(Sums<C>& sums, float* shared) {
  using B = Block<C>;
  if constexpr (B::kShares == 1) return;
  constexpr int kLanes = 32 * B::kGroups;
  float4* places = reinterpret_cast<float4*>(shared) + threadIdx.x % kLanes;
  __syncthreads();  // what was there has been read
#pragma unroll
  for (int m = 0; m < B::M; ++m) {
#pragma unroll
    for (int n = 0; n < B::N; ++n) {
      float(&own)[4] = sums[m][n];
      if (B::share() == 1) places[(m * B::N + n) * kLanes] = make_float4(own[0], own[1], own[2], own[3]);
    }
  }
  __syncthreads();
  if (B::share() == 1) return;
#pragma unroll
  for (int m = 0; m < B::M; ++m) {
#pragma unroll
    for (int n = 0; n < B::N; ++n) {
      float(&own)[4] = sums[m][n];
      const float4 other = places[(m * B::N + n) * kLanes];
      own[0] += other.x, own[1] += other.y, own[2] += other.z, own[3] += other.w;
    }
  }
}

// Calls f(tap, offset) for every tap of a kernel, with how far from a pixel its tap reads.
template <int K, int kPitch, typename F>
__device__ void for_taps(F f) {
#pragma unroll 1
  for (int ky = 0; ky < K; ++ky) {
#pragma unroll 1
    for (int kx = 0; kx < K; ++kx) f(ky * K + kx, (ky - K / 2) * kPitch + kx - K / 2);
  }
}

// Calls f with the size of a kernel as a compile-time constant.
template <typename F>
__device__ void with_size(int kernel_size, F f) {
  if (kernel_size == 3) f(std::integral_constant<int, 3>());
  else f(std::integral_constant<int, 1>());
}

// --- Forward ---------------------------------------------------------------------------------------------------

template <int C>
struct Forward : Block<C> {
  using B = Block<C>;
  // For lanes that read eight outputs of four inputs.
  __host__ __device__ static constexpr int weight_pitch(int K) { return C * K * K + 4; }
  static constexpr int kWeights = B::kTileFloats, kSums = kWeights + B::kOut * weight_pitch(3);
  static constexpr int kFloats = kSums + 2 * B::kGroups * B::kOut;
  static constexpr int kBlocks = C == 16 ? 5 : C == 32 ? 3 : 2;  // that fit a multiprocessor
};

constexpr int kJobsOfBlock = 2;  // neighbours, which are usually one with many taps and one with few

struct ForwardLaunch {
  Shape shape;
  Input input;
  int count;
  Job jobs[kMaxJobs];
};

// Of each of the lane's output channels, which f(m, h, ·) numbers, the sum over its pixels inside the picture.
template <int C, typename F>
__device__ void sum_pixels(float* shared, const bool (&inside)[Block<C>::N], F value) {
  using B = Block<C>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < B::M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < B::N; ++n) {
        if (inside[n]) sum += value(m, n, 2 * h) + value(m, n, 2 * h + 1);
      }
      sum = sum_over_quad(sum);
      if (lane % 4 == 0 && B::share() == 0) shared[B::group() * B::kOut + m * 16 + h * 8 + lane / 4] = sum;
    }
  }
  __syncthreads();
}

template <int C>
__device__ float sum_of_groups(const float* shared, int channel) {
  float sum = 0.f;
#pragma unroll
  for (int group = 0; group < Block<C>::kGroups; ++group) sum += shared[group * Block<C>::kOut + channel];
  return sum;
}

// Shared memory, once more: float [2, kGroups, kOut].
template <int C>
__device__ void store_moments(float* target, float* shared, const Sums<C>& sums, const bool (&inside)[Block<C>::N],
                              float count) {
  using B = Block<C>;
  float *sums_of_groups = shared, *squares_of_groups = shared + B::kGroups * B::kOut;
  sum_pixels<C>(sums_of_groups, inside, [&](int m, int n, int r) { return sums[m][n][r]; });
  float means[B::M][2];
#pragma unroll
  for (int m = 0; m < B::M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      means[m][h] = sum_of_groups<C>(sums_of_groups, m * 16 + h * 8 + threadIdx.x % 32 / 4) / count;
    }
  }
  sum_pixels<C>(squares_of_groups, inside, [&](int m, int n, int r) {
    const float deviation = sums[m][n][r] - means[m][r / 2];
    return deviation * deviation;
  });
  const int channel = threadIdx.x;
  if (channel >= B::kOut) return;
  target[3 * channel] = count;
  target[3 * channel + 1] = sum_of_groups<C>(sums_of_groups, channel) / count;
  target[3 * channel + 2] = sum_of_groups<C>(squares_of_groups, channel);
}

template <typename T, int C>
__device__ void store_outputs(const Job& job, const Shape& shape, const Place<C>& place, int first_out,
                              const Sums<C>& sums, float* sums_of_groups) {
  using F = Forward<C>;
  const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4, plane = shape.height * shape.width;
  T* z = output<T>(job.z) + (int64_t(place.picture) * C + first_out + g) * plane;
  bool inside[F::N];
#pragma unroll
  for (int n = 0; n < F::N; ++n) {
    const int y = place.y + F::row(n), x = place.x + F::column(n) + 2 * q;
    inside[n] = F::share() == 0 && y < shape.height && x < shape.width;
    if (!inside[n]) continue;
#pragma unroll
    for (int m = 0; m < F::M; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        T* target = z + int64_t(m * 16 + h * 8) * plane + y * shape.width + x;
        store2(target, make_float2(sums[m][n][2 * h], sums[m][n][2 * h + 1]));
      }
    }
  }
  float* moments = output(job.moments) + 3 * (int64_t(blockIdx.x) * C + first_out);
  store_moments<C>(moments, sums_of_groups, sums, inside, place.pixels_inside(shape));
}

// Shared memory: relu(x) [C, kPlane], W [kOut, weight_pitch], sums of groups. Grid: (parts, slices of pairs of jobs).
template <int C, typename T, bool kExact>
__global__ void __launch_bounds__(Block<C>::kThreads, Forward<C>::kBlocks)
    fwd_kernel(const __grid_constant__ ForwardLaunch launch) {
  using F = Forward<C>;
  const Shape& shape = launch.shape;
  const int first_out = blockIdx.y % F::kSlices * F::kOut, q = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
  const Place<C> place(shape, blockIdx.x);
  extern __shared__ __align__(16) float shared[];
  float* tile = shared;
  float* weights = shared + F::kWeights;
  const int first = blockIdx.y / F::kSlices * kJobsOfBlock, end = min(first + kJobsOfBlock, launch.count);
  bool has_tile = false;
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    const Job& job = launch.jobs[i];
    if (!runs(job.mixing)) continue;
    if (has_tile) __syncthreads();  // all but the tile has been read
    Sums<C> sums = {};
    with_size(job.kernel_size, [&](auto size) {
      constexpr int K = decltype(size)::value, kFloats = C * K * K;
      const float* source = input(job.weight) + first_out * kFloats;
      copy_rows_async<F::kOut, kFloats, F::weight_pitch(K), F::kThreads>(weights, source, kFloats);
    });
    if (!has_tile) {
      const Filling<C, C, F::kPlane, 1, F::kThreads> filling(tile, shape, place);
      filling.copy(input<T>(launch.input.x) + place.picture * launch.input.batch_stride);
      filling.activate();
      has_tile = true;
    }
    wait_for_copies();
    __syncthreads();
    with_size(job.kernel_size, [&](auto size) {
      constexpr int K = decltype(size)::value, kTaps = K * K, kPitch = F::weight_pitch(K);
      const int first_in = F::share() * F::kChannels + q;
      const float* left = weights + g * kPitch + first_in * kTaps;
      const float* right = tile + first_in * F::kPlane + Tile<C>::place(F::row(0), g);
      for_taps<K, Tile<C>::kPitch>([&](int tap, int offset) {
        add_tap<C, kPitch, kTaps, kExact, kOperandsCut<T>>(sums, left + tap, right + offset);
      });
    });
    add_shares<C>(sums, weights);
    store_outputs<T, C>(job, shape, place, first_out, sums, shared + F::kSums);
  }
}

// --- The input's gradient --------------------------------------------------------------------------------------

template <int C>
struct InputGradient : Block<C> {
  using B = Block<C>;
  // For lanes that read eight inputs of four outputs.
  __host__ __device__ static constexpr int weight_pitch(int K) { return B::kOut * K * K + 8; }
  static constexpr int kFloats = B::kTileFloats + C * weight_pitch(3);
};

struct GradientLaunch {
  Shape shape;
  Input input;
  int count, splits;
  Address dx;
  int tiles;  // that a block of the weights' gradient goes through
  GradJob jobs[kMaxJobs];
};

// Shared memory: dz [C, kPlane], W [C, weight_pitch]. Grid: (tiles, slices of input channels, splits of the jobs).
template <int C, typename T, bool kExact>
__global__ void __launch_bounds__(Block<C>::kThreads, 4 / Block<C>::kShares)
    dx_kernel(const __grid_constant__ GradientLaunch launch) {
  using G = InputGradient<C>;
  const Shape& shape = launch.shape;
  const int first_in = blockIdx.y * G::kOut, plane = shape.height * shape.width;
  const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
  const Place<C> place(shape, blockIdx.x);
  extern __shared__ __align__(16) float shared[];
  float* tile = shared;
  float* weights = tile + G::kTileFloats;

  Sums<C> sums = {};
  const int first = blockIdx.z * launch.count / launch.splits, end = (blockIdx.z + 1) * launch.count / launch.splits;
  bool has_run = false;
#pragma unroll 1
  for (int i = first; i < end; ++i) {
    const GradJob& job = launch.jobs[i];
    if (!runs(job.mixing)) continue;
    if (has_run) __syncthreads();  // tile and weights of the job before have been read
    has_run = true;
    with_size(job.kernel_size, [&](auto size) {
      constexpr int K = decltype(size)::value, kTaps = K * K, kPitch = G::weight_pitch(K);
      const float* source = input(job.weight) + first_in * kTaps;
      copy_rows_async<C, G::kOut * kTaps, kPitch, G::kThreads>(weights, source, C * kTaps);
      const Filling<C, C, G::kPlane, K / 2, G::kThreads> filling(tile, shape, place);
      filling.copy(input<T>(job.g) + place.picture * job.g_batch_stride);
      filling.template differentiate<T>(job, place.picture);
      wait_for_copies();
      __syncthreads();
      const int first_out = G::share() * G::kChannels + q;
      const float* left = weights + first_out * kPitch + g * kTaps;
      const float* right = tile + first_out * G::kPlane + Tile<C>::place(G::row(0), g);
      for_taps<K, Tile<C>::kPitch>([&](int tap, int offset) {
        add_tap<C, kTaps, kPitch, kExact, 2>(sums, left + tap, right - offset);
      });
    });
  }

  add_shares<C>(sums, tile);
  if (G::share() != 0) return;
  const int64_t first_plane = first_in + g;
  const T* x = input<T>(launch.input.x) + place.picture * launch.input.batch_stride + first_plane * plane;
  T* dx = output<T>(launch.dx) + ((int64_t(blockIdx.z) * shape.batch + place.picture) * C + first_plane) * plane;
#pragma unroll
  for (int n = 0; n < G::N; ++n) {
    const int row = place.y + G::row(n), column = place.x + G::column(n) + 2 * q;
    if (row >= shape.height || column >= shape.width) continue;
#pragma unroll
    for (int m = 0; m < G::M; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t offset = int64_t(m * 16 + h * 8) * plane + row * shape.width + column;
        const float2 at = has_run ? load2(x + offset) : make_float2(0.f, 0.f);
        // NaN lets gradients pass, as in PyTorch.
        const float2 v = make_float2(at.x <= 0.f ? 0.f : sums[m][n][2 * h], at.y <= 0.f ? 0.f : sums[m][n][2 * h + 1]);
        store2(dx + offset, v);
      }
    }
  }
}

// --- The weights' gradients ------------------------------------------------------------------------------------

template <int C>
struct WeightGradient {
  static constexpr int kIn = 16, kSlices = C / kIn;  // input channels of a block
  static constexpr int kWarps = kIn / 8 * 3, kThreads = 32 * kWarps, M = C / 16;
  static constexpr int kPlane = pad_to_bank(Tile<C>::kHaloed, 4);  // for lanes that read eight channels of four pixels
  __host__ __device__ static constexpr int out_pitch(int K) { return kIn * K * K + 4; }
  static constexpr int kFloats = std::max((C + kIn) * kPlane + Tile<C>::kEnd, C * out_pitch(3));
};

// sums += dz · relu(x)ᵀ at one row of taps.
template <int C, int K, bool kExact, int kCut>
__device__ void add_tile(float (&sums)[C / 16][K][4], const float* dz, const float* x) {
  using G = WeightGradient<C>;
  constexpr int kAcross = Tile<C>::kColumns / 8;
#pragma unroll 1
  for (int row = 0; row < Tile<C>::kRows; ++row) {
#pragma unroll 2
    for (int part = 0; part < kAcross; ++part) {
      const int offset = row * Tile<C>::kPitch + part * 8;
      Fragment<2, kExact> right[K];
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
#pragma unroll
        for (int i = 0; i < 2; ++i) right[kx].set_cut(i, x[offset + kx - K / 2 + 4 * i]);
      }
#pragma unroll
      for (int m = 0; m < C / 16; ++m) {
        Fragment<4, kExact> left;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          left.set_cut(i, unbiased<kExact, kCut>(dz[(m * 16 + i % 2 * 8) * G::kPlane + offset + i / 2 * 4]));
        }
#pragma unroll
        for (int kx = 0; kx < K; ++kx) multiply<kExact>(sums[m][kx], left, right[kx]);
      }
    }
  }
}

// Shared memory: dz [C, kPlane], relu(x) [kIn, kPlane]; then the sums [C, out_pitch].
// Grid: (parts, slices of input channels, jobs).
template <int C, typename T, bool kExact>
__global__ void __launch_bounds__(WeightGradient<C>::kThreads, 3)
    dw_kernel(const __grid_constant__ GradientLaunch launch) {
  using G = WeightGradient<C>;
  const Shape& shape = launch.shape;
  const GradJob& job = launch.jobs[blockIdx.z];
  if (!runs(job.mixing)) return;
  const int first_in = blockIdx.y * G::kIn, plane = shape.height * shape.width;
  const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4, warp = threadIdx.x / 32;
  const int ky = warp % 3, channel = warp / 3 * 8;  // of the block's
  const int first = blockIdx.x * launch.tiles, end = min(first + launch.tiles, launch.count);
  extern __shared__ __align__(16) float shared[];
  float* dz_tile = shared;
  float* x_tile = dz_tile + C * G::kPlane;

  with_size(job.kernel_size, [&](auto size) {
    constexpr int K = decltype(size)::value;
    float sums[G::M][K][4] = {};
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      const Place<C> place(shape, i);
      if (i > first) __syncthreads();  // the tiles before have been read
      const Filling<C, C, G::kPlane, 0, G::kThreads> dz(dz_tile, shape, place);
      const Filling<C, G::kIn, G::kPlane, K / 2, G::kThreads> x(x_tile, shape, place);
      dz.copy(input<T>(job.g) + place.picture * job.g_batch_stride);
      x.copy(input<T>(launch.input.x) + place.picture * launch.input.batch_stride + int64_t(first_in) * plane);
      dz.template differentiate<T>(job, place.picture);
      x.activate();
      __syncthreads();
      if (ky >= K) continue;
      add_tile<C, K, kExact, kOperandsCut<T>>(sums, dz_tile + g * G::kPlane + Tile<C>::place(0, q),
                             x_tile + (channel + g) * G::kPlane + Tile<C>::place(ky - K / 2, q));
    }
    __syncthreads();  // the last tiles have been read
    constexpr int kTaps = K * K, kPitch = G::out_pitch(K), kQuads = G::kIn * kTaps / 4;
    if (ky < K) {
#pragma unroll
      for (int m = 0; m < G::M; ++m) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float* taps = shared + (m * 16 + r / 2 * 8 + g) * kPitch + (channel + 2 * q + r % 2) * kTaps + ky * K;
#pragma unroll
          for (int kx = 0; kx < K; ++kx) taps[kx] = sums[m][kx][r];
        }
      }
    }
    __syncthreads();
    float* partial = output(job.partial) + (int64_t(blockIdx.x) * C * C + first_in) * kTaps;
    for (int i = threadIdx.x; i < C * kQuads; i += G::kThreads) {
      const int out = i / kQuads, quad = i % kQuads;
      store4(partial + out * C * kTaps + 4 * quad, *reinterpret_cast<const float4*>(shared + out * kPitch + 4 * quad));
    }
  });
}

// Calls f with the number of channels, the Type of pictures and the precision of products.
template <typename F>
auto specialise(const Shape& shape, F f) {
  const auto with_precision = [&](auto C) {
    return storage::with_precision(shape.bf16, shape.exact, [&](auto type, auto exact) { return f(C, type, exact); });
  };
  switch (shape.channels) {
    case 16: return with_precision(std::integral_constant<int, 16>());
    case 32: return with_precision(std::integral_constant<int, 32>());
    case 64: return with_precision(std::integral_constant<int, 64>());
    default: throw std::invalid_argument("convolutions of 16, 32 or 64 channels");
  }
}

// How many tiles a block of the weights' gradient goes through: so that one convolution just fills the GPU.
template <int C>
int tiles_of_block(const Shape& shape) {
  return ceil_div(tiles_of<C>(shape) * WeightGradient<C>::kSlices, kMultiprocessors);
}

template <typename Launch, typename J>
void put_jobs(Launch& parameters, const std::vector<J>& jobs) {
  if (jobs.size() > kMaxJobs) throw std::invalid_argument("too many convolutions in one launch");
  std::copy(jobs.begin(), jobs.end(), parameters.jobs);
}

}  // namespace

int forward_parts(const Shape& shape) {
  return specialise(shape, [&](auto C, auto, auto) { return tiles_of<C()>(shape); });
}

int backward_parts(const Shape& shape) {
  return specialise(shape, [&](auto C, auto, auto) {
    return ceil_div(tiles_of<C()>(shape), tiles_of_block<C()>(shape));
  });
}

int dx_splits(const Shape& shape, int jobs) {
  return specialise(shape, [&](auto C, auto, auto) {
    const int blocks = tiles_of<C()>(shape) * Block<C()>::kSlices;
    return std::min(jobs, ceil_div(2 * kMultiprocessors, blocks));
  });
}

void forward(const Shape& shape, const Input& input, const std::vector<Job>& jobs, Address stream) {
  ForwardLaunch parameters{shape, input, int(jobs.size()), {}};
  put_jobs(parameters, jobs);
  specialise(shape, [&](auto C, auto type, auto exact) {
    using T = typename decltype(type)::type;
    using F = Forward<C()>;
    const dim3 grid(tiles_of<C()>(shape), ceil_div(jobs.size(), kJobsOfBlock) * F::kSlices);
    launch(fwd_kernel<C(), T, exact()>, grid, F::kThreads, F::kFloats * sizeof(float), stream, parameters);
  });
}

void input_gradient(const Shape& shape, const Input& input, const std::vector<GradJob>& jobs, int splits, Address dx,
                    Address stream) {
  GradientLaunch parameters{shape, input, int(jobs.size()), splits, dx, 0, {}};
  put_jobs(parameters, jobs);
  specialise(shape, [&](auto C, auto type, auto exact) {
    using T = typename decltype(type)::type;
    using G = InputGradient<C()>;
    launch(dx_kernel<C(), T, exact()>, dim3(tiles_of<C()>(shape), G::kSlices, splits), G::kThreads,
           G::kFloats * sizeof(float), stream, parameters);
  });
}

void weight_gradients(const Shape& shape, const Input& input, const std::vector<GradJob>& jobs, Address stream) {
  specialise(shape, [&](auto C, auto type, auto exact) {
    using T = typename decltype(type)::type;
    using G = WeightGradient<C()>;
    GradientLaunch parameters{shape, input, tiles_of<C()>(shape), 1, 0, tiles_of_block<C()>(shape), {}};
    put_jobs(parameters, jobs);
    launch(dw_kernel<C(), T, exact()>, dim3(backward_parts(shape), G::kSlices, jobs.size()), G::kThreads,
           G::kFloats * sizeof(float), stream, parameters);
  });
}

}  // namespace dense_conv
