// 1x1 convolutions of relu(x) on the tensor cores; pointwise.h has the legend.
//
// Memory decides, so all that a block reads is on its way before it waits for any of it. All pictures are one row
// of quads (four neighbouring pixels), so planes of any size fill the tiles.
//
// Forward, a warp owns 32 pixels and a share of the input channels: its lanes load their right operands from
// global memory straight into registers, and the shares are added up through shared memory. With few pixels there
// are more shares, so that a picture of 8 x 8 still occupies the chip. Blocks go on to further pixels rather than
// leave more parts of the moments, which somebody has to merge.
// Backward, a block owns some pixels of up to 64 input channels, with dz formed as g and z are read, and keeps their
// gradient in registers while it goes through all that read them.

#include "pointwise.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "arithmetic.cuh"
#include "async_copy.cuh"
#include "launch.cuh"
#include "storage.cuh"
#include "tensor_core.cuh"
#include "tiles.cuh"

namespace pointwise {
namespace {

using arithmetic::ceil_div;
using arithmetic::relu;
using async_copies::copy4_async;
using async_copies::copy_async;
using async_copies::wait_for_copies;
using launching::kMultiprocessors;
using launching::launch;
using storage::input;
using storage::load2;
using storage::load4;
using storage::output;
using storage::store4;
using tensor_core::Fragment;
using tensor_core::multiply;
using tensor_core::place_of_column;
using tensor_core::sum_over_quad;
using tiles::component;
using tiles::read4;

constexpr int kGroup = 32;           // pixels that a warp multiplies at a time
constexpr int kChunk = 16;           // channels whose weights a lane loads at a time, four of them
constexpr int kChunksInFlight = 2;

__host__ __device__ int pixels_of(const Shape& shape) {  // of a plane of z
  return shape.stride == 1 ? shape.height * shape.width : (shape.height + 1) / 2 * (shape.width / 2);
}

// Where a quad of the row of all pictures of z lies.
struct Quad {
  bool exists;
  int picture, pixel;

  __device__ Quad(const Shape& shape, int i) {
    const unsigned a_picture = pixels_of(shape) / 4, last = a_picture * shape.batch - 1;
    exists = unsigned(i) <= last;
    const unsigned quad = min(unsigned(i), last);  // one that can be read
    picture = quad / a_picture;
    pixel = (quad - picture * a_picture) * 4;
  }

  __device__ int64_t offset(int64_t batch_stride) const { return picture * batch_stride + pixel; }
};

// The pixels of x that a quad stands for: neighbours, or every second one of a row from column `corner` on.
template <int Stride>
struct Pixels {
  bool exist;
  int64_t offset;  // of the first, at stride 2 of the row's pixels from column 0 on

  __device__ Pixels(const Shape& shape, const Quad& quad, int64_t batch_stride, int corner) {
    if constexpr (Stride == 1) {
      exist = quad.exists;
      offset = quad.offset(batch_stride);
    } else {
      const int width = shape.width / 2, y = quad.pixel / width, row = 2 * y + corner;
      exist = quad.exists && row < shape.height;
      offset = quad.picture * batch_stride + row * shape.width + 2 * (quad.pixel - y * width);
    }
  }
};

// --- Forward ---------------------------------------------------------------------------------------------------

template <int M>  // tiles of 16 output channels
struct Block {
  static constexpr int kWarps = M == 4 ? 8 : 16;  // whose registers fit
  static constexpr int kThreads = 32 * kWarps;
};

struct Split {
  int shares;      // of the input channels
  int iterations;  // of a block, over groups of pixels
  int parts;       // blocks
};

Split split_of(const Shape& shape, int warps) {
  const int chunks = shape.C / kChunk, groups = ceil_div(shape.batch * pixels_of(shape), kGroup);
  int shares = 1;
  while (shares * kChunksInFlight < chunks && shares < warps) shares *= 2;
  while (shares < std::min(chunks, warps) && groups * shares < kMultiprocessors * warps) shares *= 2;
  shares = std::min(shares, warps);
  const int at_once = warps / shares, blocks = ceil_div(groups, at_once);
  const int iterations = ceil_div(blocks, kMultiprocessors);
  return {shares, iterations, ceil_div(blocks, iterations)};
}

struct ForwardLaunch {
  Shape shape;
  Split split;
  Job jobs[kMaxJobs];
};

// A warp's operands: x of kChunksInFlight chunks, of which a lane holds a quad of four channels each.
template <typename T, int Stride>
struct Operands {
  float4 v[kChunksInFlight][4];

  __device__ void load(const Job& job, const Shape& shape, int quad, int first, int shares) {
    const Pixels<Stride> pixels(shape, Quad(shape, quad), job.x_batch_stride, job.corner);
    const T* x = input<T>(job.x) + pixels.offset + (Stride == 1 ? 0 : job.corner);
    const int q = threadIdx.x % 4, plane = shape.height * shape.width;
#pragma unroll
    for (int i = 0; i < kChunksInFlight; ++i) {
      const int channel = (first + i * shares) * kChunk + 4 * q;
      if (channel >= shape.C) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const T* source = x + int64_t(channel + k) * plane;
        if constexpr (Stride == 1) {
          v[i][k] = load4(source);
        } else {
          v[i][k] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (!pixels.exist) continue;
          using storage::load;
          v[i][k] = make_float4(load(source), load(source + 2), load(source + 4), load(source + 6));
        }
      }
    }
  }
};

template <int M>
using Sums = float[M][4][4];  // of 16 output channels by 8 columns, for each pixel of a quad

// sums += W · relu(x) of one chunk.
template <int M, bool kExact>
__device__ void multiply_chunk(Sums<M>& sums, const float4 (&v)[4], const float* weight, int C, int O) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int step = 0; step < 2; ++step) {  // two of the lane's four channels
    Fragment<2, kExact> right[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) right[t].set(i, relu(component(v[2 * step + i], t)));
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      // Rows past the last are computed from some other row, and not stored.
      const float2 upper = load2(weight + min(m * 16 + g, O - 1) * C + 2 * step);
      const float2 lower = load2(weight + min(m * 16 + g + 8, O - 1) * C + 2 * step);
      Fragment<4, kExact> left;
      left.set(0, upper.x), left.set(1, lower.x), left.set(2, upper.y), left.set(3, lower.y);
#pragma unroll
      for (int t = 0; t < 4; ++t) multiply<kExact>(sums[m][t], left, right[t]);
    }
  }
}

// Eight output channels by 32 pixels are an item, of which a lane holds two quads of one channel.
// Shared memory: float4 [warps][items][2][32], the summands of each item; float2 [groups][O], moments.
template <int M>
__device__ void share_sums(float4* shared, const Sums<M>& sums) {
#pragma unroll
  for (int item = 0; item < 2 * M; ++item) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int m = item / 2, r = item % 2 * 2 + e;
      shared[(item * 2 + e) * 32 + threadIdx.x % 32] =
          make_float4(sums[m][0][r], sums[m][1][r], sums[m][2][r], sums[m][3][r]);
    }
  }
}

__device__ float4 sum_of_shares(const float4* shared, int shares, int stride) {
  float4 sum = shared[0];
  for (int share = 1; share < shares; ++share) {
    const float4 v = shared[share * stride];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

__device__ float sum4(float4 v) { return (v.x + v.y) + (v.z + v.w); }

__device__ float squared_deviations(float4 v, float mean) {
  return (v.x - mean) * (v.x - mean) + (v.y - mean) * (v.y - mean) + (v.z - mean) * (v.z - mean) +
         (v.w - mean) * (v.w - mean);
}

// {mean, sum of squared deviations} of two sets of values as one, as Chan, Golub and LeVeque do.
__device__ float2 merge(float2 a, float count_a, float2 b, float count_b) {
  const float difference = b.x - a.x, share = count_b / fmaxf(count_a + count_b, 1.f);
  return make_float2(fmaf(difference, share, a.x),
                     a.y + b.y + difference * difference * count_a * share);
}

// A warp's part in its block: `shares` warps share the channels of each of `groups` groups of pixels.
struct Role {
  int shares, groups, share, group, iterations;

  __device__ Role(const Split& split, int warps)
      : shares(split.shares),
        groups(warps / split.shares),
        share(threadIdx.x / 32 % split.shares),
        group(threadIdx.x / 32 / split.shares),
        iterations(split.iterations) {}

  __device__ int group_of_grid(int group_of_block, int iteration) const {
    return (blockIdx.x * iterations + iteration) * groups + group_of_block;
  }
};

__device__ int pixels_of_group(const Shape& shape, int group) {
  return min(max(shape.batch * pixels_of(shape) - group * kGroup, 0), kGroup);
}

// Adds up the shares of this warp's items and stores them; `moments` [O] of the group take in those of this iteration.
template <typename T, int M>
__device__ void store_items(const Job& job, const Shape& shape, const Role& role, int iteration,
                            const float4* shared, float2* moments) {
  constexpr int kItems = 2 * M;
  const int lane = threadIdx.x % 32, q = lane % 4, group = role.group_of_grid(role.group, iteration);
  const float count = pixels_of_group(shape, group), before = iteration * kGroup;
  for (int item = role.share; item < kItems && item * 8 < shape.O; item += role.shares) {
    const int channel = item * 8 + lane / 4;
    const float4* summands = shared + (role.group * role.shares * kItems + item) * 64 + lane;
    T* z = output<T>(job.z) + int64_t(channel) * pixels_of(shape);
    float4 v[2];
    bool exists[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      v[e] = sum_of_shares(summands + e * 32, role.shares, kItems * 64);
      const Quad quad(shape, group * (kGroup / 4) + place_of_column(2 * q + e));
      exists[e] = quad.exists;
      if (exists[e]) store4(z + quad.offset(job.z_batch_stride), v[e]);
    }
    const float sum = sum_over_quad((exists[0] ? sum4(v[0]) : 0.f) + (exists[1] ? sum4(v[1]) : 0.f));
    const float mean = sum / fmaxf(count, 1.f);
    const float squares = sum_over_quad((exists[0] ? squared_deviations(v[0], mean) : 0.f) +
                                        (exists[1] ? squared_deviations(v[1], mean) : 0.f));
    if (q != 0) continue;
    const float2 own = make_float2(mean, squares);
    moments[channel] = iteration == 0 ? own : merge(moments[channel], before, own, count);
  }
}

// The moments of a channel from those of the block's groups [groups, O].
__device__ void store_moments(float* target, const float2* moments, const Shape& shape, const Role& role) {
  float2 sum = make_float2(0.f, 0.f);
  float count = 0.f;
  for (int group = 0; group < role.groups; ++group) {
    float own = 0.f;
    for (int i = 0; i < role.iterations; ++i) own += pixels_of_group(shape, role.group_of_grid(group, i));
    sum = merge(sum, count, moments[group * shape.O], own);
    count += own;
  }
  target[0] = count, target[1] = sum.x, target[2] = sum.y;
}

// Grid: (parts, jobs).
template <int M, int Stride, typename T, bool kExact>
__global__ void __launch_bounds__(Block<M>::kThreads) fwd_kernel(const __grid_constant__ ForwardLaunch launch) {
  launching::let_next_begin();
  constexpr int kSummands = 2 * M * 64;  // of a warp
  const Shape& shape = launch.shape;
  const Job& job = launch.jobs[blockIdx.y];
  const Role role(launch.split, Block<M>::kWarps);
  const int lane = threadIdx.x % 32, chunks = shape.C / kChunk;
  extern __shared__ __align__(16) float4 shared[];
  float2* moments = reinterpret_cast<float2*>(shared + Block<M>::kWarps * kSummands);

  const auto quad_of = [&](int iteration) {
    return role.group_of_grid(role.group, iteration) * (kGroup / 4) + place_of_column(lane / 4);
  };
  Operands<T, Stride> operands;
  operands.load(job, shape, quad_of(0), role.share, role.shares);
  for (int iteration = 0; iteration < role.iterations; ++iteration) {
    Sums<M> sums = {};
    for (int first = role.share; first < chunks; first += kChunksInFlight * role.shares) {
      if (first != role.share) operands.load(job, shape, quad_of(iteration), first, role.shares);
#pragma unroll
      for (int i = 0; i < kChunksInFlight; ++i) {
        const int chunk = first + i * role.shares;
        if (chunk >= chunks) break;
        const float* weight = input(job.weight) + chunk * kChunk + lane % 4 * 4;
        multiply_chunk<M, kExact>(sums, operands.v[i], weight, shape.C, shape.O);
      }
    }
    if (iteration + 1 < role.iterations) {
      operands.load(job, shape, quad_of(iteration + 1), role.share, role.shares);
    }
    __syncthreads();  // the sums of the iteration before have been read
    share_sums<M>(shared + threadIdx.x / 32 * kSummands, sums);
    __syncthreads();
    store_items<T, M>(job, shape, role, iteration, shared, moments + role.group * shape.O);
  }
  __syncthreads();
  const int channel = threadIdx.x;
  if (channel >= shape.O) return;
  store_moments(output(job.moments) + blockIdx.x * job.moments_stride + 3 * channel, moments + channel, shape, role);
}

// --- Backward --------------------------------------------------------------------------------------------------

constexpr int kBackwardThreads = 256, kBackwardWarps = kBackwardThreads / 32;

struct Tile {
  int channels;  // of the input, a block's share
  int pixels;    // 64 or 128, so that every thread stays in its column of quads

  // Rows of x and dz in shared memory: so that neither lanes that read four rows of two quads meet in a bank nor
  // those that read two rows of four quads.
  __host__ __device__ int pitch() const { return pixels + 4; }
  __host__ __device__ int weight_pitch() const { return (channels + 31) / 32 * 32 + 8; }
  int shared_floats(const Shape& shape) const { return (channels + shape.O) * pitch() + shape.O * weight_pitch(); }
};

Tile tile_of(const Shape& shape) {
  int channels = 64;
  while (shape.C % channels != 0) channels -= 16;
  const int total = shape.batch * pixels_of(shape), blocks = ceil_div(total, 128) * (shape.C / channels);
  return {channels, blocks >= 2 * kMultiprocessors ? 128 : 64};
}

struct TargetOfLaunch {
  Address x;
  int64_t x_batch_stride;
  int corner;
  Address dx;
  int first, count;  // of the sources
};

struct BackwardLaunch {
  Shape shape;
  Tile tile;
  TargetOfLaunch targets[kMaxTargets];
  Source sources[kMaxJobs];
};

// dz = A · g + B · z + D of the tile's pixels; zero for those past the last.
template <typename T>
__device__ void load_dz(float* target, const Source& job, const Shape& shape, const Quad& quad, int row,
                        int row_step, int pitch) {
  constexpr int kBatch = 4;  // rows in flight
  const int pixels = pixels_of(shape);
  const T* g = input<T>(job.g) + quad.offset(job.g_batch_stride);
  const T* z = input<T>(job.z) + quad.offset(job.z_batch_stride);
  for (; row < shape.O; row += kBatch * row_step) {
    float4 gs[kBatch], zs[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int o = min(row + i * row_step, shape.O - 1);
      gs[i] = load4(g + int64_t(o) * pixels), zs[i] = load4(z + int64_t(o) * pixels);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int o = row + i * row_step;
      if (o >= shape.O) break;
      const float4 coef = load4(input(job.coef) + 4 * o);
      float4 dz = make_float4(0.f, 0.f, 0.f, 0.f);
      if (quad.exists) {
        dz.x = fmaf(coef.x, gs[i].x, fmaf(coef.y, zs[i].x, coef.z));
        dz.y = fmaf(coef.x, gs[i].y, fmaf(coef.y, zs[i].y, coef.z));
        dz.z = fmaf(coef.x, gs[i].z, fmaf(coef.y, zs[i].z, coef.z));
        dz.w = fmaf(coef.x, gs[i].w, fmaf(coef.y, zs[i].w, coef.z));
      }
      *reinterpret_cast<float4*>(target + o * pitch) = dz;
    }
  }
}

__device__ float4 masked(float4 v, float4 x) {  // by relu'(x); NaN lets gradients pass, as in PyTorch
  return make_float4(x.x <= 0.f ? 0.f : v.x, x.y <= 0.f ? 0.f : v.y, x.z <= 0.f ? 0.f : v.z, x.w <= 0.f ? 0.f : v.w);
}

// Wᵀ · dz of the tile, of which a warp takes 16 channels by 32 pixels at a time, at most kTasks times.
constexpr int kTasks = 2;
using InputSums = float[kTasks][4][4];

template <typename F>
__device__ void for_tasks(const Tile& tile, F f) {
  const int groups = tile.pixels / kGroup;
#pragma unroll
  for (int i = 0; i < kTasks; ++i) {
    const int task = threadIdx.x / 32 + i * kBackwardWarps;
    if (task < tile.channels / 16 * groups) f(i, task / groups * 16, task % groups * kGroup);
  }
}

template <bool kExact>
__device__ void add_input_gradient(InputSums& sums, const float* dz, const float* weight, const Shape& shape,
                                   const Tile& tile) {
  const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4, pitch = tile.pitch(), weight_pitch = tile.weight_pitch();
  for_tasks(tile, [&](int i, int channel, int pixel) {
    const float* w = weight + q * weight_pitch + channel + g;
    const float* right_of_lane = dz + q * pitch + pixel + 4 * place_of_column(g);
#pragma unroll 2
    for (int o = 0; o < shape.O; o += 8) {
      Fragment<4, kExact> left;
#pragma unroll
      for (int k = 0; k < 4; ++k) left.set(k, w[(o + k / 2 * 4) * weight_pitch + k % 2 * 8]);
      const float4 upper = read4(right_of_lane + o * pitch), lower = read4(right_of_lane + (o + 4) * pitch);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        Fragment<2, kExact> right;
        right.set(0, component(upper, t)), right.set(1, component(lower, t));
        multiply<kExact>(sums[i][t], left, right);
      }
    }
  });
}

// dx = relu'(x) · sums.
template <typename T, int Stride>
__device__ void store_input_gradient(const TargetOfLaunch& target, const InputSums& sums, const float* x,
                                     const Shape& shape, const Tile& tile, int first_channel, int first_quad) {
  const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4, plane = shape.height * shape.width;
  for_tasks(tile, [&](int i, int channel, int pixel) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = pixel / 4 + place_of_column(2 * q + e);
      const Quad quad(shape, first_quad + column);
      const Pixels<Stride> pixels(shape, quad, int64_t(shape.C) * plane, target.corner);
      if (!pixels.exist) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = channel + h * 8 + g, r = h * 2 + e;
        T* dx = output<T>(target.dx) + pixels.offset + int64_t(first_channel + c) * plane;
        const float4 v = masked(make_float4(sums[i][0][r], sums[i][1][r], sums[i][2][r], sums[i][3][r]),
                                read4(x + c * tile.pitch() + 4 * column));
        if constexpr (Stride == 1) {
          store4(dx, v);
        } else {
          const bool odd = target.corner;
          store4(dx, odd ? make_float4(0.f, v.x, 0.f, v.y) : make_float4(v.x, 0.f, v.y, 0.f));
          store4(dx + 4, odd ? make_float4(0.f, v.z, 0.f, v.w) : make_float4(v.z, 0.f, v.w, 0.f));
        }
      }
    }
  });
}

// dW = dz · relu(x)ᵀ of the tile. A warp takes all O by 8 input channels at a time.
template <int M, bool kExact>
__device__ void weight_gradient(float* partial, const float* x, const float* dz, const Shape& shape,
                                const Tile& tile) {
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4, pitch = tile.pitch();
  for (int first = threadIdx.x / 32 * 8; first < tile.channels; first += kBackwardWarps * 8) {
    float sums[M][4] = {};
    // A lane contracts eight neighbouring pixels of 32.
#pragma unroll 1
    for (int pixel = 8 * q; pixel < tile.pixels; pixel += kGroup) {
#pragma unroll 1
      for (int e = 0; e < 2; ++e) {
        const float4 v = read4(x + (first + g) * pitch + pixel + 4 * e);
        Fragment<2, kExact> right[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) right[i / 2].set(i % 2, relu(component(v, i)));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float* row = dz + pixel + 4 * e;
          const float4 upper = read4(row + min(m * 16 + g, shape.O - 1) * pitch);
          const float4 lower = read4(row + min(m * 16 + g + 8, shape.O - 1) * pitch);
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            Fragment<4, kExact> left;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              left.set(2 * i, component(upper, 2 * step + i));
              left.set(2 * i + 1, component(lower, 2 * step + i));
            }
            multiply<kExact>(sums[m], left, right[step]);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int o = m * 16 + h * 8 + g;
        if (o >= shape.O) continue;
        float* target = partial + o * shape.C + first + 2 * q;
        *reinterpret_cast<float2*>(target) = make_float2(sums[m][2 * h], sums[m][2 * h + 1]);
      }
    }
  }
}

// Shared memory: x [channels, pitch], dz [O, pitch], W [O, weight_pitch].
// Grid: (parts, blocks of channels, targets).
template <int M, int Stride, typename T, bool kExact>
__global__ void __launch_bounds__(kBackwardThreads, 2) bwd_kernel(const __grid_constant__ BackwardLaunch launch) {
  launching::let_next_begin();
  const Shape& shape = launch.shape;
  const Tile& tile = launch.tile;
  const TargetOfLaunch& target = launch.targets[blockIdx.z];
  const int pitch = tile.pitch(), first_channel = blockIdx.y * tile.channels;
  extern __shared__ __align__(16) float shared_floats[];
  float* x = shared_floats;
  float* dz = x + tile.channels * pitch;
  float* weight = dz + shape.O * pitch;

  const int across = tile.pixels / 4, column = threadIdx.x % across, row = threadIdx.x / across;
  const int row_step = kBackwardThreads / across, first_quad = blockIdx.x * across;
  const int plane = shape.height * shape.width;
  const Quad quad(shape, first_quad + column);
  const Pixels<Stride> pixels(shape, quad, target.x_batch_stride, target.corner);
  const T* picture = input<T>(target.x) + pixels.offset + int64_t(first_channel) * plane;
  for (int c = row; c < tile.channels; c += row_step) {
    const T* source = picture + int64_t(c) * plane;
    float* place = x + c * pitch + 4 * column;
    if constexpr (Stride == 1) {
      copy_async(place, source, pixels.exist);
    } else {
#pragma unroll
      for (int t = 0; t < 4; ++t) copy4_async(place + t, source + 2 * t + target.corner, pixels.exist);
    }
  }
  InputSums sums = {};
#pragma unroll 1
  for (int i = target.first; i < target.first + target.count; ++i) {
    const Source& source = launch.sources[i];
    if (i > target.first) __syncthreads();  // dz and W of the source before have been read
    const int weight_quads = tile.channels / 4;
    for (int k = threadIdx.x; k < shape.O * weight_quads; k += kBackwardThreads) {
      const int o = k / weight_quads, c = k % weight_quads * 4;
      copy_async(weight + o * tile.weight_pitch() + c, input(source.weight) + o * shape.C + first_channel + c, true);
    }
    load_dz<T>(dz + 4 * column, source, shape, quad, row, row_step, pitch);
    wait_for_copies();
    __syncthreads();
    if (target.dx != 0) add_input_gradient<kExact>(sums, dz, weight, shape, tile);
    if (source.partial != 0) {
      float* partial = output(source.partial) + int64_t(blockIdx.x) * shape.O * shape.C + first_channel;
      weight_gradient<M, kExact>(partial, x, dz, shape, tile);
    }
  }
  if (target.dx != 0) store_input_gradient<T, Stride>(target, sums, x, shape, tile, first_channel, first_quad);
}

// Calls f with the tiles of 16 output channels, the stride, the Type of pictures and the precision of products.
template <typename F>
auto specialise(const Shape& shape, F f) {
  const auto with_precision = [&](auto M, auto stride) {
    return storage::with_precision(shape.bf16, shape.exact,
                                   [&](auto type, auto exact) { return f(M, stride, type, exact); });
  };
  const auto with_stride = [&](auto M) {
    return shape.stride == 1 ? with_precision(M, std::integral_constant<int, 1>())
                             : with_precision(M, std::integral_constant<int, 2>());
  };
  if (shape.O <= 16) return with_stride(std::integral_constant<int, 1>());
  if (shape.O <= 32) return with_stride(std::integral_constant<int, 2>());
  return with_stride(std::integral_constant<int, 4>());
}

void check_room(bool there_is) {
  if (!there_is) throw std::invalid_argument("too many 1x1 convolutions in one launch");
}

}  // namespace

int forward_parts(const Shape& shape) {
  return specialise(shape, [&](auto M, auto, auto, auto) { return split_of(shape, Block<M()>::kWarps).parts; });
}

int backward_parts(const Shape& shape) {
  return ceil_div(shape.batch * pixels_of(shape), tile_of(shape).pixels);
}

void forward(const Shape& shape, const std::vector<Job>& jobs, Address stream) {
  check_room(jobs.size() <= kMaxJobs);
  specialise(shape, [&](auto M, auto stride, auto type, auto exact) {
    using T = typename decltype(type)::type;
    constexpr int kWarps = Block<M()>::kWarps;
    ForwardLaunch parameters{shape, split_of(shape, kWarps), {}};
    std::copy(jobs.begin(), jobs.end(), parameters.jobs);
    const int moments = kWarps / parameters.split.shares * shape.O * sizeof(float2);
    launch(fwd_kernel<M(), stride(), T, exact()>, dim3(parameters.split.parts, jobs.size()), Block<M()>::kThreads,
           kWarps * 2 * M() * 64 * sizeof(float4) + moments, stream, parameters);
  });
}

void backward(const Shape& shape, const std::vector<Target>& targets, Address stream) {
  const Tile tile = tile_of(shape);
  BackwardLaunch parameters{shape, tile, {}, {}};
  check_room(targets.size() <= kMaxTargets);
  int count = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    const Target& target = targets[i];
    const int own = target.sources.size();
    check_room(count + own <= kMaxJobs);
    parameters.targets[i] = {target.x, target.x_batch_stride, target.corner, target.dx, count, own};
    std::copy(target.sources.begin(), target.sources.end(), parameters.sources + count);
    count += own;
  }
  specialise(shape, [&](auto M, auto stride, auto type, auto exact) {
    using T = typename decltype(type)::type;
    launch(bwd_kernel<M(), stride(), T, exact()>,
           dim3(backward_parts(shape), shape.C / tile.channels, targets.size()), kBackwardThreads,
           tile.shared_floats(shape) * sizeof(float), stream, parameters);
  });
}

}  // namespace pointwise
