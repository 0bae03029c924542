// The backward convolution stages of a fused cell; cell_conv.h has the legend.
//
// A block owns a tile of one picture. For each convolution it computes e = W_pwᵀ · dz on the tile and its halo
// (phase one: dz is formed from g and z as they are loaded, so it never exists in memory) and then, strip by
// strip, adds W_dwᵀ ⋆ e to the input gradient in registers, and takes the weight gradients while e, dz and x
// are at hand (phase two). Where a stage joins the convolutions of one state, the block walks through all of
// them and stores their common input gradient once.
//
// Phase two gives a lane eight neighbouring pixels of one channel. Both operands of the pointwise weight
// gradient dz · dᵀ are then where the tensor cores want them: pixels are contracted, in any order.

#include "cell_conv_common.cuh"

namespace cell_conv {
namespace {

constexpr int kMaxGradJobs = 32;
constexpr int kFirstPad = 4, kSecondPad = 2;  // rows around a tile that a stage's largest kernel reads
constexpr int kReduceColumns = 32, kReduceSplits = 8;
constexpr int kMaxSharedBytes = 227 * 1024;

struct BackwardLaunch {
  Shape shape;
  int count, splits;
  GradJob jobs[kMaxGradJobs];
};

// Lane g of eight contracts with the channels g · C / 8 + r: so its weights lie side by side. Their slots in
// shared memory are 8r + g.
template <int C>
__device__ int channel_slot(int channel) {
  return channel % (C / 8) * 8 + channel / (C / 8);
}

template <int C>
__device__ int slot_channel(int slot) {
  return slot % 8 * (C / 8) + slot / 8;
}

// The order of the output channels of dz; its own inverse. See contraction_slot in cell_conv_forward.cu.
__device__ inline int gradient_slot(int channel) {
  return (channel & ~15) | (channel & 3) << 2 | (channel >> 2 & 3);
}

template <int C, bool kWeights>
struct Block {
  static constexpr int kThreads = C == 16 || (C == 64 && !kWeights) ? 256 : 512;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kChannelGroups = C / 8;                        // of eight channels, one a lane g
  static constexpr int kWarpsPerGroup = kWarps / kChannelGroups;
  static constexpr int kPasses = Tile<C>::kRuns / 4 / kWarpsPerGroup;  // of four runs, one a lane q
  static constexpr int kMinBlocks = kThreads == 256 ? 2 : 1;
  static constexpr int kWeightFloats = 8 * C + 8 * kTapsPitch;        // a warp's partial weight gradients
  static_assert(kPasses * kWarpsPerGroup * 4 == Tile<C>::kRuns, "every run has a lane");
};

template <int C, bool kWeights>
struct Memory {  // of a block, in shared memory
  static constexpr int kPitch = C == 16 ? 40 : C == 32 ? 28 : 20;
  static constexpr int kGradientPlane = Tile<C>::kRows * Tile<C>::kWidth + 4;
  int plane;  // chosen against bank conflicts of phase two's windows
  float *e, *taps, *x, *dz, *partial;

  __host__ __device__ static int plane_floats(const Shape& shape, int pad) {
    return pad_to_bank(stored_rows<C>(shape, pad) * kPitch, C == 16 ? 4 : 16);
  }
  __host__ __device__ static int floats(const Shape& shape, int pad) {
    using B = Block<C, kWeights>;
    const int base = C * plane_floats(shape, pad) + C * kTapsPitch;
    const int weights = C * plane_floats(shape, pad) + C * kGradientPlane;
    return base + (kWeights ? weights + slots(shape, pad) * B::kChannelGroups * B::kWeightFloats : 0);
  }
  // How many warps of the same channels have room to store their weight gradients at a time.
  __host__ __device__ static int slots(const Shape& shape, int pad) {
    using B = Block<C, kWeights>;
    const int most = 2 * C * plane_floats(shape, pad) + C * kTapsPitch + C * kGradientPlane +
                     B::kWarps * B::kWeightFloats;
    return most * int(sizeof(float)) <= kMaxSharedBytes ? B::kWarpsPerGroup : 1;
  }
  __device__ Memory(const Shape& shape, int pad, float* shared) : plane(plane_floats(shape, pad)) {
    e = shared;
    taps = e + C * plane;
    x = taps + C * kTapsPitch;
    dz = x + C * plane;
    partial = dz + C * kGradientPlane;
  }
  __device__ const float* row(const float* slot_plane, const Place<C>& at, int y) const {
    return slot_plane + at.stored(y) * kPitch;
  }
};

__device__ inline float4 affine(float4 coef, float4 g, float4 z) {
  const auto one = [&](float g_, float z_) { return fmaf(coef.x, g_, fmaf(coef.y, z_, coef.z)); };
  return make_float4(one(g.x, z.x), one(g.y, z.y), one(g.z, z.z), one(g.w, z.w));
}

// Phase one. A warp computes e of sixteen channels on eight strips of four pixels.
template <int C, int Pad, bool kWeights, bool kExact>
__device__ void compute_e(const Memory<C, kWeights>& memory, const GradJob& job, const Place<C>& at,
                          const Shape& shape) {
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4, width = shape.width;
  const int plane = shape.height * width;
  const float* gradient = reinterpret_cast<const float*>(job.g) + at.picture * job.g_batch_stride;
  const float* z = reinterpret_cast<const float*>(job.z) + int64_t(at.picture) * C * plane;
  const float4* coef = reinterpret_cast<const float4*>(job.coef);
  const float* weights = reinterpret_cast<const float*>(job.pointwise);
  const bool aligned = rows_aligned(reinterpret_cast<const void*>(job.g), job.g_batch_stride, width);

  const auto contracted = [&](int step, int half) { return step / 2 * 16 + 4 * q + step % 2 * 2 + half; };

  // The strips of the tile with its halo that lie inside the picture.
  const int top = max(0, at.y0 - Pad), bottom = min(shape.height, at.y0 + Tile<C>::kRows + Pad);
  // Columns only where the picture goes on beside the tile, and then as many as keep `across` a power of two.
  const bool wide = width > Tile<C>::kWidth;
  const int left = at.x0 - (wide ? kHalo : 0), right = at.x0 + Tile<C>::kWidth + (wide ? kHalo : 0);
  const int shift = __ffs(Tile<C>::kWidth / 4) - 1 + wide, strips = (bottom - top) << shift;
  const auto place = [&](int strip) {  // its row and column, and whether it is any of ours
    const int y = top + (strip >> shift), x = left + (strip & ((1 << shift) - 1)) * 4;
    return make_int3(y, x, strip < strips && 0 <= x && x < min(right, width));
  };
  const int units = (strips + 7) / 8;
  for (int task = threadIdx.x / 32; task < units * (C / 16); task += Block<C, kWeights>::kWarps) {
    const int unit = task % units, m = task / units;
    const int3 own = place(unit * 8 + g);
    const int y = own.x, x = own.y;
    const bool inside = own.z;
    float sums[4][4] = {};
    // The next channels are on their way while these are multiplied.
    float4 next_g[2], next_z[2];
    const auto load = [&](int step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int offset = contracted(step, half) * plane + y * width;
        if (aligned) {
          next_g[half] = load4(gradient + offset + x), next_z[half] = load4(z + offset + x);
        } else {
          next_g[half] = load_row4(gradient + offset, x, width, false);
          next_z[half] = load_row4(z + offset, x, width, false);
        }
      }
    };
    if (inside) load(0);
#pragma unroll 1
    for (int step = 0; step < C / 8; ++step) {
      const float4 g_now[2] = {next_g[0], next_g[1]}, z_now[2] = {next_z[0], next_z[1]};
      if (inside && step + 1 < C / 8) load(step + 1);
      Fragment<2, kExact> b[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = contracted(step, half);
        float4 dz = make_float4(0.f, 0.f, 0.f, 0.f);
        if (inside) {
          dz = affine(__ldg(coef + channel), g_now[half], z_now[half]);
          if (!aligned) {
            if (x + 1 >= width) dz.y = 0.f;
            if (x + 2 >= width) dz.z = 0.f;
            if (x + 3 >= width) dz.w = 0.f;
          }
          const int row = y - at.y0, column = x - at.x0;
          if (kWeights && m == 0 && 0 <= row && row < Tile<C>::kRows && 0 <= column && column < Tile<C>::kWidth) {
            *reinterpret_cast<float4*>(memory.dz + gradient_slot(channel) * Memory<C, kWeights>::kGradientPlane +
                                       row * Tile<C>::kWidth + column) = dz;
          }
        }
        b[0].set(half, dz.x), b[1].set(half, dz.y), b[2].set(half, dz.z), b[3].set(half, dz.w);
      }
      const float* row = weights + contracted(step, 0) * C + g * (C / 8) + 2 * m;
      const float2 first = __ldg(reinterpret_cast<const float2*>(row));
      const float2 second = __ldg(reinterpret_cast<const float2*>(row + C));
      Fragment<4, kExact> a;
      a.set(0, first.x), a.set(1, first.y), a.set(2, second.x), a.set(3, second.y);
#pragma unroll
      for (int t = 0; t < 4; ++t) multiply<kExact>(sums[t], a, b[t]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int3 strip = place(unit * 8 + 2 * q + i);  // of the sums' column 2q + i
      if (!strip.z) continue;
      float* target =
          memory.e + (strip.x - at.first) * Memory<C, kWeights>::kPitch + kHalo + strip.y - at.x0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int slot = m * 16 + h * 8 + g, r = 2 * h + i;
        *reinterpret_cast<float4*>(target + slot * memory.plane) =
            make_float4(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
      }
    }
  }
}

// Adds to dx what a row of e contributes by `w`, a row of taps.
template <int K, int D>
__device__ void gather_row(float (&dx)[8], const float (&window)[16], const float (&w)[K]) {
#pragma unroll
  for (int kx = 0; kx < K; ++kx) {
#pragma unroll
    for (int t = 0; t < 8; ++t) dx[t] = fmaf(w[kx], window[kHalo + t + D * (K / 2) - kx * D], dx[t]);
  }
}

template <int K, int D>
__device__ void convolve_row(float (&d)[8], const float (&window)[16], const float (&w)[K]) {
#pragma unroll
  for (int kx = 0; kx < K; ++kx) {
#pragma unroll
    for (int t = 0; t < 8; ++t) d[t] = fmaf(w[kx], window[kHalo + t + kx * D - D * (K / 2)], d[t]);
  }
}

template <int K, int D>
__device__ void correlate_row(float* grad, const float (&window)[16], const float (&e)[8]) {
#pragma unroll
  for (int kx = 0; kx < K; ++kx) {
#pragma unroll
    for (int t = 0; t < 8; ++t) grad[kx] = fmaf(e[t], window[kHalo + t + kx * D - D * (K / 2)], grad[kx]);
  }
}

// This lane's run of eight pixels in a pass, as (row, column) of the tile.
template <int C, bool kWeights>
__device__ int2 lane_run(int pass) {
  using B = Block<C, kWeights>;
  const int warp = threadIdx.x / 32 / B::kChannelGroups;
  const int run = (warp + pass * B::kWarpsPerGroup) * 4 + threadIdx.x % 4;
  return make_int2(run / Tile<C>::kRunsPerRow, run % Tile<C>::kRunsPerRow * 8);
}

template <int C, bool kWeights>
__device__ int lane_slot() {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  return warp % Block<C, kWeights>::kChannelGroups * 8 + g;
}

// pointwise[m] += dz · dᵀ over the pixels of the warp's four runs.
template <int C, bool kWeights, bool kExact>
__device__ void add_pointwise_gradient(float (&pointwise)[C / 16][4], const Memory<C, kWeights>& memory,
                                       const float (&d)[8], int2 run) {
  constexpr int kPlane = Memory<C, kWeights>::kGradientPlane;
  const int g = threadIdx.x % 32 / 4;
  const float* dz = memory.dz + g * kPlane + run.x * Tile<C>::kWidth + run.y;
#pragma unroll
  for (int t = 0; t < 8; t += 4) {
    Fragment<2, kExact> b[2];
    b[0].set(0, d[t]), b[0].set(1, d[t + 1]), b[1].set(0, d[t + 2]), b[1].set(1, d[t + 3]);
#pragma unroll
    for (int m = 0; m < C / 16; ++m) {
      const float4 upper = *reinterpret_cast<const float4*>(dz + m * 16 * kPlane + t);
      const float4 lower = *reinterpret_cast<const float4*>(dz + (m * 16 + 8) * kPlane + t);
      Fragment<4, kExact> a;
      a.set(0, upper.x), a.set(1, lower.x), a.set(2, upper.y), a.set(3, lower.y);
      multiply<kExact>(pointwise[m], a, b[0]);
      a.set(0, upper.z), a.set(1, lower.z), a.set(2, upper.w), a.set(3, lower.w);
      multiply<kExact>(pointwise[m], a, b[1]);
    }
  }
}

// A warp's weight gradients into shared memory, [C][8] pointwise and [8][kTapsPitch] depthwise; where there are
// fewer slots than warps that share channels, these take turns and add.
template <int C, int K>
__device__ void store_warp_gradients(float* target, const float (&depthwise)[K * K],
                                     const float (&pointwise)[C / 16][4], int slots) {
  using B = Block<C, true>;
  const int q = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
  const int group = threadIdx.x / 32 % B::kChannelGroups, turn = threadIdx.x / 32 / B::kChannelGroups;
  float* partial = target + (turn % slots * B::kChannelGroups + group) * B::kWeightFloats;
  for (int round = 0; round < B::kWarpsPerGroup / slots; ++round) {
    if (round > 0) __syncthreads();
    if (turn / slots != round) continue;
    const auto add = [&](float& place, float v) { place = round == 0 ? v : place + v; };
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const float sum = sum_over_quad(depthwise[tap]);
      if (q == tap % 4) add(partial[8 * C + g * kTapsPitch + tap], sum);
    }
#pragma unroll
    for (int m = 0; m < C / 16; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) add(partial[(m * 16 + r / 2 * 8 + g) * 8 + 2 * q + r % 2], pointwise[m][r]);
    }
  }
}

// Phase two: the input gradient and this warp's share of the weight gradients.
template <int C, int K, int D, bool kWeights, bool kExact>
__device__ void differentiate(float (&dx)[Block<C, kWeights>::kPasses][8], const Memory<C, kWeights>& memory,
                              const Place<C>& at, const Shape& shape) {
  using B = Block<C, kWeights>;
  constexpr int kPad = D * (K / 2);
  const int slot = lane_slot<C, kWeights>();
  const float* taps = memory.taps + slot * kTapsPitch;
  float depthwise[kWeights ? K * K : 1] = {}, pointwise[C / 16][4] = {};
#pragma unroll
  for (int pass = 0; pass < B::kPasses; ++pass) {
    const int2 run = lane_run<C, kWeights>(pass);
    const int y = at.y0 + run.x;
    const float* e = memory.e + slot * memory.plane + run.y;
    const float* x = memory.x + slot * memory.plane + run.y;
    float own[8], d[8] = {};
    if constexpr (kWeights) {
      const float* center = memory.row(e, at, y) + kHalo;
#pragma unroll
      for (int t = 0; t < 8; t += 4) {
        const float4 v = *reinterpret_cast<const float4*>(center + t);
        own[t] = v.x, own[t + 1] = v.y, own[t + 2] = v.z, own[t + 3] = v.w;
      }
    }
    // Unrolled only where it must be, for the weight gradients: the instruction cache is small.
#pragma unroll (kWeights ? K : 1)
    for (int ky = 0; ky < K; ++ky) {
      float w[K], window[16];
      load_tap_row<K>(w, taps, ky);
      load_window<kPad, 8>(window, memory.row(e, at, y + kPad - ky * D));
      gather_row<K, D>(dx[pass], window, w);
      if constexpr (kWeights) {
        load_window<kPad, 8>(window, memory.row(x, at, y + ky * D - kPad));
        convolve_row<K, D>(d, window, w);
        correlate_row<K, D>(depthwise + ky * K, window, own);
      }
    }
    if constexpr (kWeights) add_pointwise_gradient<C, kWeights, kExact>(pointwise, memory, d, run);
  }
  if constexpr (kWeights) store_warp_gradients<C, K>(memory.partial, depthwise, pointwise, memory.slots(shape, at.pad));
}

// The block's weight gradients, summed over the warps that share channels.
template <int C, int K, bool kWeights>
__device__ void store_weight_partials(const GradJob& job, const float* partial, int slots) {
  using B = Block<C, kWeights>;
  const auto sum_over_warps = [&](int slot, int offset) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < slots; ++warp) {
      sum += partial[(warp * B::kChannelGroups + slot / 8) * B::kWeightFloats + offset];
    }
    return sum;
  };
  float* pointwise = reinterpret_cast<float*>(job.pointwise_partial) + int64_t(blockIdx.x) * C * C;
  for (int i = threadIdx.x; i < C * C; i += B::kThreads) {
    const int out = gradient_slot(i / C), slot = channel_slot<C>(i % C);
    pointwise[i] = sum_over_warps(slot, out * 8 + slot % 8);
  }
  float* depthwise = reinterpret_cast<float*>(job.depthwise_partial) + int64_t(blockIdx.x) * C * K * K;
  for (int i = threadIdx.x; i < C * K * K; i += B::kThreads) {
    const int slot = channel_slot<C>(i / (K * K));
    depthwise[i] = sum_over_warps(slot, 8 * C + slot % 8 * kTapsPitch + i % (K * K));
  }
}

template <int C, int K, int D, bool kWeights, bool kExact>
__device__ void process(float (&dx)[Block<C, kWeights>::kPasses][8], const Memory<C, kWeights>& memory,
                        const GradJob& job, const Place<C>& at, const Shape& shape) {
  load_taps<C, Block<C, kWeights>::kThreads>(memory.taps, reinterpret_cast<const float*>(job.depthwise), K,
                                             channel_slot<C>);
  compute_e<C, D*(K / 2), kWeights, kExact>(memory, job, at, shape);
  __syncthreads();
  differentiate<C, K, D, kWeights, kExact>(dx, memory, at, shape);
  __syncthreads();
  if constexpr (kWeights) store_weight_partials<C, K, kWeights>(job, memory.partial, memory.slots(shape, at.pad));
}

// Clears e and dz, whose pixels outside the picture stay zero, and loads x where weight gradients need it.
template <int C, bool kWeights>
__device__ void prepare(const Memory<C, kWeights>& memory, const GradJob& job, const Place<C>& at,
                        const Shape& shape) {
  constexpr int kThreads = Block<C, kWeights>::kThreads;
  const auto clear = [&](float* target, int floats) {
    for (int i = threadIdx.x; i < floats / 4; i += kThreads) {
      reinterpret_cast<float4*>(target)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  };
  clear(memory.e, C * memory.plane);
  if constexpr (kWeights) {
    clear(memory.dz, C * Memory<C, kWeights>::kGradientPlane);
    const Source source(job.x, job.x_batch_stride, job.stats, shape, at.picture);
    load_tile<C, kThreads>(memory.x, source, at, shape, Memory<C, kWeights>::kPitch, memory.plane,
                           channel_slot<C>);
  }
  __syncthreads();
}

// Stores relu'(x) · dx; returns this lane's {Σ dx, Σ dx · (x − mean)}.
template <int C, bool kWeights>
__device__ float2 store_dx(float* target, const float (&dx)[Block<C, kWeights>::kPasses][8],
                           const Source& source, const Place<C>& at, const Shape& shape) {
  const int channel = slot_channel<C>(lane_slot<C, kWeights>()), width = shape.width;
  const float mean = source.mean(channel);
  float2 sums = make_float2(0.f, 0.f);
#pragma unroll
  for (int pass = 0; pass < Block<C, kWeights>::kPasses; ++pass) {
    const int2 run = lane_run<C, kWeights>(pass);
    if (at.y0 + run.x >= shape.height) continue;
    const int64_t row = (int64_t(channel) * shape.height + at.y0 + run.x) * width;
#pragma unroll
    for (int t = 0; t < 8; t += 4) {
      const int column = at.x0 + run.y + t;
      const float4 x = load_row4(source.x + row, column, width, source.aligned);
      const auto masked = [&](float x_, float dx_, int at_) {
        const float v = x_ > mean && at_ < width ? dx_ : 0.f;
        sums.x += v;
        sums.y = fmaf(v, v == 0.f ? 0.f : x_ - mean, sums.y);
        return v;
      };
      const float4 v = make_float4(masked(x.x, dx[pass][t], column), masked(x.y, dx[pass][t + 1], column + 1),
                                   masked(x.z, dx[pass][t + 2], column + 2),
                                   masked(x.w, dx[pass][t + 3], column + 3));
      store_row4(target + row, column, width, width % 4 == 0, v);
    }
  }
  return sums;
}

// Grid: (parts, splits); a block processes every job whose number leaves blockIdx.y when divided by splits.
template <int C, bool kWeights, bool kExact>
__global__ void __launch_bounds__(Block<C, kWeights>::kThreads, Block<C, kWeights>::kMinBlocks)
    backward_first_kernel(const __grid_constant__ BackwardLaunch launch) {
  extern __shared__ __align__(16) float shared[];
  const Shape& shape = launch.shape;
  const Place<C> place(shape, kFirstPad);
  prepare<C, kWeights>(Memory<C, kWeights>(shape, kFirstPad, shared), launch.jobs[0], place, shape);
  float dx[Block<C, kWeights>::kPasses][8] = {};
#pragma unroll 1
  for (int j = blockIdx.y; j < launch.count; j += launch.splits) {
    const GradJob& job = launch.jobs[j];
    // Unknown to the compiler, which would else compute the addresses of all four kinds ahead of the loop and spill.
    int zero = 0;
    asm volatile("" : "+r"(zero));
    Place<C> at = place;
    at.y0 += zero;
    const Memory<C, kWeights> memory(shape, kFirstPad, shared + zero);
    switch (job.kernel_size * 2 + job.dilation) {
      case 7: process<C, 3, 1, kWeights, kExact>(dx, memory, job, at, shape); break;
      case 8: process<C, 3, 2, kWeights, kExact>(dx, memory, job, at, shape); break;
      case 11: process<C, 5, 1, kWeights, kExact>(dx, memory, job, at, shape); break;
      default: process<C, 5, 2, kWeights, kExact>(dx, memory, job, at, shape); break;
    }
  }
  const GradJob& job = launch.jobs[0];
  const Source source(job.x, job.x_batch_stride, job.stats, shape, place.picture);
  const int64_t picture = int64_t(C) * shape.height * shape.width;
  store_dx<C, kWeights>(
      reinterpret_cast<float*>(job.dx) + (int64_t(blockIdx.y) * shape.batch + place.picture) * picture, dx, source,
      place, shape);
}

// Grid: (parts, jobs).
template <int C, bool kWeights, bool kExact>
__global__ void __launch_bounds__(Block<C, kWeights>::kThreads, Block<C, kWeights>::kMinBlocks)
    backward_second_kernel(const __grid_constant__ BackwardLaunch launch) {
  using B = Block<C, kWeights>;
  extern __shared__ __align__(16) float shared[];
  const Shape& shape = launch.shape;
  const GradJob& job = launch.jobs[blockIdx.y];
  const Place<C> at(shape, kSecondPad);
  const Memory<C, kWeights> memory(shape, kSecondPad, shared);
  prepare<C, kWeights>(memory, job, at, shape);
  float dx[B::kPasses][8] = {};
  if (job.kernel_size == 5) process<C, 5, 1, kWeights, kExact>(dx, memory, job, at, shape);
  else process<C, 3, 1, kWeights, kExact>(dx, memory, job, at, shape);

  const Source source(job.x, job.x_batch_stride, job.stats, shape, at.picture);
  const int64_t picture = int64_t(at.picture) * C * shape.height * shape.width;
  float2 sums = store_dx<C, kWeights>(reinterpret_cast<float*>(job.dx) + picture, dx, source, at, shape);
  sums = make_float2(sum_over_quad(sums.x), sum_over_quad(sums.y));
  float2* by_warp = reinterpret_cast<float2*>(memory.e);  // which nobody reads any more
  const int slot = lane_slot<C, kWeights>();
  if (threadIdx.x % 4 == 0) by_warp[threadIdx.x / 32 / B::kChannelGroups * C + slot] = sums;
  __syncthreads();
  for (int channel = threadIdx.x; channel < C; channel += B::kThreads) {
    float2 total = make_float2(0.f, 0.f);
    for (int warp = 0; warp < B::kWarpsPerGroup; ++warp) {
      const float2 v = by_warp[warp * C + channel_slot<C>(channel)];
      total.x += v.x, total.y += v.y;
    }
    reinterpret_cast<float2*>(job.sums)[int64_t(blockIdx.x) * C + channel] = total;
  }
}

struct CoefLaunch {
  int channels, parts;
  float scale;  // 1 / (B · H · W), or 0 where the statistics are constants
  CoefJob jobs[kMaxGradJobs];
};

// Grid: (channels, jobs). A warp adds up the parts of one channel.
__global__ void first_coefficients_kernel(const __grid_constant__ CoefLaunch launch) {
  const CoefJob& job = launch.jobs[blockIdx.y];
  const int channel = blockIdx.x, C = launch.channels;
  const float2* sums = reinterpret_cast<const float2*>(job.sums);
  float2 total = make_float2(0.f, 0.f);
  for (int part = threadIdx.x; part < launch.parts; part += 32) {
    const float2 v = __ldg(sums + int64_t(part) * C + channel);
    total.x += v.x, total.y += v.y;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total.x += __shfl_xor_sync(~0u, total.x, offset);
    total.y += __shfl_xor_sync(~0u, total.y, offset);
  }
  if (threadIdx.x != 0) return;
  const float2 stats = __ldg(reinterpret_cast<const float2*>(job.stats) + channel);
  const float rstd = stats.y, slope = -rstd * rstd * rstd * total.y * launch.scale;
  const float offset = -rstd * total.x * launch.scale - slope * stats.x;
  reinterpret_cast<float4*>(job.coef)[channel] = make_float4(rstd, slope, offset, 0.f);
}

struct ReduceLaunch {
  ReduceJob jobs[128];
};

// Grid: (blocks of columns, jobs).
__global__ void __launch_bounds__(kReduceColumns* kReduceSplits)
    reduce_kernel(const __grid_constant__ ReduceLaunch launch) {
  __shared__ float sums[kReduceSplits][kReduceColumns];
  const ReduceJob& job = launch.jobs[blockIdx.y];
  const int column = blockIdx.x * kReduceColumns + threadIdx.x;
  if (blockIdx.x * kReduceColumns >= job.size) return;
  const float* partial = reinterpret_cast<const float*>(job.partial);
  float sum = 0.f;
  if (column < job.size) {
#pragma unroll 8
    for (int part = threadIdx.y; part < job.parts; part += kReduceSplits) {
      sum += __ldg(partial + int64_t(part) * job.size + column);
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= job.size) return;
  for (int split = 1; split < kReduceSplits; ++split) sum += sums[split][threadIdx.x];
  reinterpret_cast<float*>(job.grad)[column] = sum;
}

bool wants_weights(const std::vector<GradJob>& jobs) { return jobs.front().pointwise_partial != 0; }

template <typename F>
void with_variant(const Shape& shape, const std::vector<GradJob>& jobs, F f) {
  with_channels(shape, [&](auto channels) {
    with_precision(shape, [&](auto exact) {
      if (wants_weights(jobs)) f(channels, std::true_type(), exact);
      else f(channels, std::false_type(), exact);
    });
  });
}

int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace

int backward_parts(const Shape& shape) { return forward_parts(shape); }

int dx_splits(const Shape& shape, int jobs) {
  return std::clamp(multiprocessors() / backward_parts(shape), 1, jobs);
}

void backward_first(const Shape& shape, const std::vector<GradJob>& jobs, Address stream) {
  if (jobs.size() > kMaxGradJobs) throw std::invalid_argument("too many convolutions leave one state");
  BackwardLaunch parameters{shape, int(jobs.size()), dx_splits(shape, jobs.size()), {}};
  std::copy(jobs.begin(), jobs.end(), parameters.jobs);
  // By length, so that the splits, which take turns, get equal shares.
  std::stable_sort(parameters.jobs, parameters.jobs + jobs.size(), [](const GradJob& a, const GradJob& b) {
    return a.kernel_size * 4 + a.dilation > b.kernel_size * 4 + b.dilation;
  });
  parameters.jobs[0].dx = jobs.front().dx;
  with_variant(shape, jobs, [&](auto channels, auto weights, auto exact) {
    constexpr int C = channels();
    constexpr bool kWeights = weights();
    launch(backward_first_kernel<C, kWeights, exact()>, dim3(tile_count<C>(shape), parameters.splits),
           Block<C, kWeights>::kThreads, Memory<C, kWeights>::floats(shape, kFirstPad) * sizeof(float), stream, parameters);
  });
}

void backward_second(const Shape& shape, const std::vector<GradJob>& jobs, Address stream) {
  for (size_t first = 0; first < jobs.size(); first += kMaxGradJobs) {
    const size_t count = std::min(jobs.size() - first, size_t(kMaxGradJobs));
    BackwardLaunch parameters{shape, int(count), 1, {}};
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    with_variant(shape, jobs, [&](auto channels, auto weights, auto exact) {
      constexpr int C = channels();
      constexpr bool kWeights = weights();
      launch(backward_second_kernel<C, kWeights, exact()>, dim3(tile_count<C>(shape), count),
             Block<C, kWeights>::kThreads, Memory<C, kWeights>::floats(shape, kSecondPad) * sizeof(float), stream,
             parameters);
    });
  }
}

void first_coefficients(const Shape& shape, bool training, const std::vector<CoefJob>& jobs, Address stream) {
  const float count = float(shape.batch) * shape.height * shape.width;
  for (size_t first = 0; first < jobs.size(); first += kMaxGradJobs) {
    const size_t size = std::min(jobs.size() - first, size_t(kMaxGradJobs));
    CoefLaunch parameters{shape.channels, backward_parts(shape), training ? 1.f / count : 0.f, {}};
    std::copy_n(jobs.begin() + first, size, parameters.jobs);
    launch(first_coefficients_kernel, dim3(shape.channels, size), 32, 0, stream, parameters);
  }
}

void reduce(const std::vector<ReduceJob>& jobs, Address stream) {
  constexpr size_t kMaxJobs = std::size(ReduceLaunch().jobs);
  for (size_t first = 0; first < jobs.size(); first += kMaxJobs) {
    const size_t count = std::min(jobs.size() - first, kMaxJobs);
    ReduceLaunch parameters{};
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    int size = 0;
    for (size_t i = 0; i < count; ++i) size = std::max(size, parameters.jobs[i].size);
    launch(reduce_kernel, dim3((size + kReduceColumns - 1) / kReduceColumns, count),
           dim3(kReduceColumns, kReduceSplits), 0, stream, parameters);
  }
}

}  // namespace cell_conv
