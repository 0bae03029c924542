// The backward convolution stages of a fused cell; cell_conv.h has the legend.
//
// A block owns a tile of one picture. For each convolution it forms dz from g and z as they are loaded, on the
// tile and its halo, replaces it in shared memory by e = W_pwᵀ · dz (phase one) and then, strip by strip, adds
// W_dwᵀ ⋆ e to the input gradient in registers, and takes the weight gradients while e, dz and x are at hand
// (phase two). Where a stage joins the convolutions of one state, the block walks through all of them and stores
// their common input gradient once. Few blocks fit a multiprocessor, so nothing hides the latency of a load but
// other loads: all of a convolution are asked for together.
//
// Phase two gives a lane eight neighbouring pixels of one channel. Both operands of the pointwise weight
// gradient dz · dᵀ are then where the tensor cores want them: pixels are contracted, in any order.

#include "cell_conv_common.cuh"
#include "drawn.cuh"

namespace cell_conv {
namespace {

constexpr int kMaxGradJobs = 64, kMaxStates = 4;  // of a launch
constexpr int kMaxTaps = 25;
constexpr int kFirstPad = 4, kSecondPad = 2;  // rows around a tile that a stage's largest kernel reads
constexpr int kMaxSharedBytes = 227 * 1024;

struct BackwardLaunch {
  Shape shape;
  int splits;
  int ends[kMaxStates];  // of each state's jobs; the second stage has no use for them
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

template <int C, bool kWeights>
struct Block {
  static constexpr int kThreads = C == 32 ? 512 : 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kChannelGroups = C / 8;                        // of eight channels, one a lane g
  static constexpr int kWarpsPerGroup = kWarps / kChannelGroups;
  static constexpr int kPasses = Tile<C>::kRuns / 4 / kWarpsPerGroup;  // of four runs, one a lane q
  static constexpr int kMinBlocks = kThreads == 256 ? 2 : 1;
  static constexpr int kWeightFloats = 8 * C + 8 * kTapsPitch;        // a warp's partial weight gradients
  static_assert(kPasses * kWarpsPerGroup * 4 == Tile<C>::kRuns, "every run has a lane");
  static_assert(kChannelGroups * kWeightFloats >= C * C, "pointwise weights fit where their gradients will be");
};

template <int C, bool kWeights>
struct Memory {  // of a block, in shared memory
  static constexpr int kGradientPlane = Tile<C>::kRows * Tile<C>::kWidth + 4;
  int pitch, plane;  // of a row and a channel, chosen against bank conflicts of phase two's windows
  float *e, *taps, *x, *dz, *partial;
  float4* weights;  // where later `partial` is: pointwise weights in the order in which lanes multiply with them

  // At 64 channels the columns beside pictures no wider than a tile, all zeros, are those beside the next row, too: two
  // blocks fit a multiprocessor.
  __host__ __device__ static int row_floats(const Shape& shape) {
    if (C == 64) return shape.width <= Tile<C>::kWidth ? 12 : 20;
    return C == 16 ? 40 : 28;
  }
  __host__ __device__ static int plane_floats(const Shape& shape, int pad) {
    const int beside_last_row = C == 64 ? kHalo : 0;
    return pad_to_bank(stored_rows<C>(shape, pad) * row_floats(shape) + beside_last_row, C == 16 ? 4 : 16);
  }
  __host__ __device__ static int floats(const Shape& shape, int pad) {
    using B = Block<C, kWeights>;
    const int base = C * plane_floats(shape, pad) + C * kTapsPitch;
    const int weights = C * plane_floats(shape, pad) + C * kGradientPlane;
    const int warps = holds_all_warps(shape, pad) ? B::kWarps : B::kChannelGroups;
    return base + (kWeights ? weights + warps * B::kWeightFloats : C * C);
  }
  // Whether there is room for the weight gradients of every warp, or only of one for each group of channels.
  __host__ __device__ static bool holds_all_warps(const Shape& shape, int pad) {
    using B = Block<C, kWeights>;
    const int most = 2 * C * plane_floats(shape, pad) + C * kTapsPitch + C * kGradientPlane +
                     B::kWarps * B::kWeightFloats;
    return most * int(sizeof(float)) <= kMaxSharedBytes;
  }
  __device__ Memory(const Shape& shape, int pad, float* shared)
      : pitch(row_floats(shape)), plane(plane_floats(shape, pad)) {
    e = shared;
    taps = e + C * plane;
    x = taps + C * kTapsPitch;
    dz = x + C * plane;
    partial = kWeights ? dz + C * kGradientPlane : x;
    weights = reinterpret_cast<float4*>(partial);
  }
  __device__ const float* row(const float* slot_plane, const Place<C>& at, int y) const {
    return slot_plane + at.stored(y) * pitch;
  }
};

__device__ inline float4 affine(float4 coef, float4 g, float4 z) {
  const auto one = [&](float g_, float z_) { return fmaf(coef.x, g_, fmaf(coef.y, z_, coef.z)); };
  return make_float4(one(g.x, z.x), one(g.y, z.y), one(g.z, z.z), one(g.w, z.w));
}

// The strips of four pixels of the tile with its halo that lie inside the picture.
template <int C>
struct Strips {
  int top, rows, left, right;
  int shift;  // 1 << shift strips a row

  __device__ Strips(const Place<C>& at, const Shape& shape, int pad)
      : top(max(0, at.y0 - pad)), rows(min(shape.height, at.y0 + Tile<C>::kRows + pad) - top) {
    // Columns only where the picture goes on beside the tile, and then as many as keep a power of two a row.
    const bool wide = shape.width > Tile<C>::kWidth;
    left = at.x0 - (wide ? kHalo : 0);
    right = min(at.x0 + Tile<C>::kWidth + (wide ? kHalo : 0), shape.width);
    shift = __ffs(Tile<C>::kWidth / 4) - 1 + wide;
  }
  __device__ int count() const { return rows << shift; }
  __device__ int row(int strip) const { return top + (strip >> shift); }
  __device__ int column(int strip) const { return left + (strip & ((1 << shift) - 1)) * 4; }
  __device__ bool contains(int x) const { return 0 <= x && x < right; }
  // Where a strip lies in a plane of shared memory, -1 where it is none of ours.
  __device__ int offset(int strip, const Place<C>& at, int pitch) const {
    const int x = column(strip);
    return strip < count() && contains(x) ? (row(strip) - at.first) * pitch + kHalo + x - at.x0 : -1;
  }
};

// Forms dz where e will be, and for the weight gradients also by itself. Its channels lie in contraction_slot order.
// A thread takes a strip and every kGroups-th channel, so that all of their addresses differ by constants.
template <int C, bool kWeights, typename T, bool kExact>
__device__ void load_gradient(const Memory<C, kWeights>& memory, const GradJob& job, const Strips<C>& strips,
                              const Place<C>& at, const Shape& shape) {
  using M = Memory<C, kWeights>;
  constexpr int kThreads = Block<C, kWeights>::kThreads, kStrips = C == 16 ? 128 : C == 32 ? 64 : 16;
  constexpr int kGroups = kThreads / kStrips, kBatch = C == 16 ? 4 : C / kGroups;  // of loads in flight
  const int first = thread_index() / kStrips, width = shape.width, plane = shape.height * width;
  const bool aligned = rows_aligned(reinterpret_cast<const void*>(job.g), job.g_batch_stride, width);
  const float4* coef = reinterpret_cast<const float4*>(job.coef) + first;
  const auto scaled = [&](int channel) { return unbiased<kExact>(__ldg(coef + channel)); };  // all products are of dz
  for (int strip = thread_index() % kStrips; strip < strips.count(); strip += kStrips) {
    const int x = strips.column(strip), y = strips.row(strip), row = y - at.y0, column = x - at.x0;
    if (!strips.contains(x)) continue;
    const int offset = first * plane + y * width;
    const T* g = reinterpret_cast<const T*>(job.g) + at.picture * job.g_batch_stride + offset;
    const T* z = reinterpret_cast<const T*>(job.z) + int64_t(at.picture) * C * plane + offset;
    float* target = memory.e + contraction_slot(first) * memory.plane + strips.offset(strip, at, memory.pitch);
    float* copy = memory.dz + contraction_slot(first) * M::kGradientPlane + row * Tile<C>::kWidth + column;
    const bool in_tile = 0 <= row && row < Tile<C>::kRows && 0 <= column && column < Tile<C>::kWidth;
#pragma unroll
    for (int i = 0; i < C; i += kGroups * kBatch) {
      float4 dz[kBatch];
      if (aligned) {
        float4 zs[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int channel = (i + j * kGroups) * plane;
          dz[j] = load4(g + channel + x), zs[j] = load4(z + channel + x);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) dz[j] = affine(scaled(i + j * kGroups), dz[j], zs[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int channel = (i + j * kGroups) * plane;
          const float4 own = load_row4(g + channel, x, width, false), at_z = load_row4(z + channel, x, width, false);
          dz[j] = affine(scaled(i + j * kGroups), own, at_z);
          if (x + 1 >= width) dz[j].y = 0.f;
          if (x + 2 >= width) dz[j].z = 0.f;
          if (x + 3 >= width) dz[j].w = 0.f;
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int slot = contraction_slot(i + j * kGroups);  // bits that `first` has not
        *reinterpret_cast<float4*>(target + slot * memory.plane) = dz[j];
        if (kWeights && in_tile) *reinterpret_cast<float4*>(copy + slot * M::kGradientPlane) = dz[j];
      }
    }
  }
}

// Sends the pointwise weights to shared memory as the left operand of phase one, a float4 for each lane of each product.
template <int C, int Threads>
__device__ void copy_pointwise(float4* target, const float* pointwise) {
  const int thread = thread_index();
#pragma unroll
  for (int first = 0; first < C * C / 4; first += Threads) {
    const int i = first + thread;
    if (C * C / 4 % Threads != 0 && i >= C * C / 4) return;
    const int q = i % 4, g = i / 4 % 8, step = i / 32 % (C / 8), m = i / 4 / C;
    const float* row = pointwise + (step / 2 * 16 + 4 * q + step % 2 * 2) * C + g * (C / 8) + 2 * m;
    copy8_async(&target[i].x, row);
    copy8_async(&target[i].z, row + C);
  }
}

// Replaces dz by e. A warp computes sixteen channels of eight strips, or of their halves where there are warps for
// them; warps that read the same strips do so in the same round.
template <int C, bool kWeights, bool kExact>
__device__ void compute_e(const Memory<C, kWeights>& memory, const Strips<C>& strips, const Place<C>& at) {
  constexpr int kWarps = Block<C, kWeights>::kWarps;
  constexpr int kParts = C == 64 ? kWarps / 8 : 1, kPixels = 4 / kParts, kTasks = C / 16 * kParts;
  using Vector = std::conditional_t<kPixels == 4, float4, float2>;
  const int lane = thread_index() % 32, q = lane % 4, g = lane / 4;
  const int units = (strips.count() + 7) / 8;
  for (int first = 0; first < units * kTasks; first += kWarps) {
    const int task = first + thread_index() / 32, unit = task / kTasks;
    const int m = task % kTasks / kParts, pixel = task % kParts * kPixels;
    const int own = strips.offset(unit * 8 + g, at, memory.pitch);
    Vector dz[C / 8][2];
#pragma unroll
    for (int step = 0; step < C / 8; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = step / 2 * 16 + (step % 2 * 2 + half) * 4 + q;
        dz[step][half] = own < 0 ? Vector()
                                 : *reinterpret_cast<const Vector*>(memory.e + slot * memory.plane + own + pixel);
      }
    }
    __syncthreads();
    float sums[kPixels][4] = {};
#pragma unroll
    for (int step = 0; step < C / 8; ++step) {
      const float4 weights = memory.weights[(m * (C / 8) + step) * 32 + lane];
      Fragment<4, kExact> a;
      a.set_cut(0, weights.x), a.set_cut(1, weights.y);
      a.set_cut(2, weights.z), a.set_cut(3, weights.w);
#pragma unroll
      for (int t = 0; t < kPixels; ++t) {
        Fragment<2, kExact> b;
        b.set_cut(0, (&dz[step][0].x)[t]), b.set_cut(1, (&dz[step][1].x)[t]);
        multiply<kExact>(sums[t], a, b);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int target = strips.offset(unit * 8 + 2 * q + i, at, memory.pitch);  // of the sums' column 2q + i
      if (target < 0) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int slot = m * 16 + h * 8 + g;
        Vector e;
#pragma unroll
        for (int t = 0; t < kPixels; ++t) (&e.x)[t] = sums[t][2 * h + i];
        *reinterpret_cast<Vector*>(memory.e + slot * memory.plane + target + pixel) = e;
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
  const int warp = thread_index() / 32 / B::kChannelGroups;
  const int run = (warp + pass * B::kWarpsPerGroup) * 4 + thread_index() % 4;
  return make_int2(run / Tile<C>::kRunsPerRow, run % Tile<C>::kRunsPerRow * 8);
}

template <int C, bool kWeights>
__device__ int lane_slot() {
  const int warp = thread_index() / 32, g = thread_index() % 32 / 4;
  return warp % Block<C, kWeights>::kChannelGroups * 8 + g;
}

// pointwise[m] += dz · dᵀ over the pixels of the warp's four runs.
template <int C, bool kWeights, bool kExact>
__device__ void add_pointwise_gradient(float (&pointwise)[C / 16][4], const Memory<C, kWeights>& memory,
                                       const float (&d)[8], int2 run) {
  constexpr int kPlane = Memory<C, kWeights>::kGradientPlane;
  const int g = thread_index() % 32 / 4;
  const float* dz = memory.dz + g * kPlane + run.x * Tile<C>::kWidth + run.y;
#pragma unroll
  for (int t = 0; t < 8; t += 4) {
    Fragment<2, kExact> b[2];
    b[0].set_cut(0, d[t]), b[0].set_cut(1, d[t + 1]), b[1].set_cut(0, d[t + 2]), b[1].set_cut(1, d[t + 3]);
#pragma unroll
    for (int m = 0; m < C / 16; ++m) {
      const float4 upper = *reinterpret_cast<const float4*>(dz + m * 16 * kPlane + t);
      const float4 lower = *reinterpret_cast<const float4*>(dz + (m * 16 + 8) * kPlane + t);
      Fragment<4, kExact> a;
      a.set_cut(0, upper.x), a.set_cut(1, lower.x), a.set_cut(2, upper.y), a.set_cut(3, lower.y);
      multiply<kExact>(pointwise[m], a, b[0]);
      a.set_cut(0, upper.z), a.set_cut(1, lower.z), a.set_cut(2, upper.w), a.set_cut(3, lower.w);
      multiply<kExact>(pointwise[m], a, b[1]);
    }
  }
}

// A warp's weight gradients into shared memory, [C][8] pointwise and [8][kTapsPitch] depthwise; where there is no
// room for all warps, those that share channels take turns and add.
template <int C>
__device__ void store_warp_gradients(float* target, const float (&depthwise)[kMaxTaps],
                                     const float (&pointwise)[C / 16][4], bool holds_all) {
  using B = Block<C, true>;
  const int q = thread_index() % 4, g = thread_index() % 32 / 4;
  const int group = thread_index() / 32 % B::kChannelGroups, turn = thread_index() / 32 / B::kChannelGroups;
  constexpr int kQuads = (kMaxTaps + 3) / 4;
  float sums[kQuads];  // of the taps 4i + q
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const auto tap = [&](int k) { return 4 * i + k < kMaxTaps ? depthwise[4 * i + k] : 0.f; };
    sums[i] = sums_over_quad(tap(0), tap(1), tap(2), tap(3));
  }
  const auto store = [&](float* partial, auto put) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) put(partial[8 * C + g * kTapsPitch + 4 * i + q], sums[i]);
#pragma unroll
    for (int m = 0; m < C / 16; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) put(partial[(m * 16 + r / 2 * 8 + g) * 8 + 2 * q + r % 2], pointwise[m][r]);
    }
  };
  const auto set = [](float& place, float v) { place = v; };
  const auto add = [](float& place, float v) { place += v; };
  float* partial = target + group * B::kWeightFloats;
  if (holds_all) return store(partial + turn * B::kChannelGroups * B::kWeightFloats, set);
  for (int round = 0; round < B::kWarpsPerGroup; ++round) {
    if (round > 0) __syncthreads();
    if (turn != round) continue;
    if (round == 0) store(partial, set);
    else store(partial, add);
  }
}

// Of one run of eight pixels: dx += W_dwᵀ ⋆ e, and for the weight gradients d = W_dw ⋆ x and depthwise += e ⋆ x.
template <int C, typename Kind, bool kWeights>
__device__ void differentiate_rows(float (&dx)[8], float (&d)[8], float* depthwise, const float (&own)[8], int slot,
                                   int2 run, const Memory<C, kWeights>& memory, const Place<C>& at) {
  constexpr int kSize = Kind::kSize, kDilation = Kind::kDilation, kPad = Kind::kPad;
  const int y = at.y0 + run.x;
  const float* e = memory.e + slot * memory.plane + run.y;
  const float* x = memory.x + slot * memory.plane + run.y;
  // Unrolled only where it must be, for the weight gradients: the instruction cache is small.
#pragma unroll (kWeights ? kSize : 1)
  for (int ky = 0; ky < kSize; ++ky) {
    float w[kSize], window[16];
    load_tap_row<kSize>(w, memory.taps + slot * kTapsPitch, ky);
    load_window<kPad, 8>(window, memory.row(e, at, y + kPad - ky * kDilation));
    gather_row<kSize, kDilation>(dx, window, w);
    if constexpr (kWeights) {
      load_window<kPad, 8>(window, memory.row(x, at, y + ky * kDilation - kPad));
      convolve_row<kSize, kDilation>(d, window, w);
      correlate_row<kSize, kDilation>(depthwise + ky * kSize, window, own);
    }
  }
}

template <int N>
__device__ void rotate(float (&runs)[N][8]) {  // the first to the end
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const float first = runs[0][t];
#pragma unroll
    for (int i = 1; i < N; ++i) runs[i - 1][t] = runs[i][t];
    runs[N - 1][t] = first;
  }
}

// Phase two: the input gradient and this warp's share of the weight gradients.
template <int C, bool kWeights, bool kExact>
__device__ void differentiate(float (&dx)[Block<C, kWeights>::kPasses][8], const Memory<C, kWeights>& memory,
                              const GradJob& job, const Place<C>& at, const Shape& shape) {
  const int slot = lane_slot<C, kWeights>();
  float depthwise[kWeights ? kMaxTaps : 1] = {}, pointwise[C / 16][4] = {};
  // Rolled, for the instruction cache: the run at hand is always dx[0].
#pragma unroll 1
  for (int pass = 0; pass < Block<C, kWeights>::kPasses; ++pass, rotate(dx)) {
    const int2 run = lane_run<C, kWeights>(pass);
    float own[8], d[8] = {};
    if constexpr (kWeights) {
      const float* center = memory.row(memory.e + slot * memory.plane, at, at.y0 + run.x) + run.y + kHalo;
#pragma unroll
      for (int t = 0; t < 8; t += 4) {
        const float4 v = *reinterpret_cast<const float4*>(center + t);
        own[t] = v.x, own[t + 1] = v.y, own[t + 2] = v.z, own[t + 3] = v.w;
      }
    }
    with_kind(job.kernel_size, job.dilation, [&](auto kind) {
      differentiate_rows<C, decltype(kind), kWeights>(dx[0], d, depthwise, own, slot, run, memory, at);
    });
    if constexpr (kWeights) add_pointwise_gradient<C, kWeights, kExact>(pointwise, memory, d, run);
  }
  if constexpr (kWeights) {
    store_warp_gradients<C>(memory.partial, depthwise, pointwise, memory.holds_all_warps(shape, at.pad));
  }
}

// The block's weight gradients, summed over the warps that share channels. What a thread stores one after the other
// lies at constant distances, in both memories.
template <int C>
__device__ void store_weight_partials(const GradJob& job, const float* partial, bool holds_all) {
  using B = Block<C, true>;
  const auto sum_over_warps = [&](const float* place) {
    float sum = *place;
    if (!holds_all) return sum;
#pragma unroll
    for (int i = 1; i < B::kWarpsPerGroup; ++i) sum += place[i * B::kChannelGroups * B::kWeightFloats];
    return sum;
  };
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;

  constexpr int kRows = B::kThreads / C;  // of the pointwise weights that are stored at a time
  const int slot = channel_slot<C>(thread % C);
  const float* row = partial + slot / 8 * B::kWeightFloats + contraction_slot(thread / C) * 8 + slot % 8;
  float* pointwise = reinterpret_cast<float*>(job.pointwise_partial) + int64_t(blockIdx.x) * C * C + thread;
#pragma unroll
  for (int i = 0; i < C; i += kRows) pointwise[i * C] = sum_over_warps(row + contraction_slot(i) * 8);

  const int taps = job.kernel_size * job.kernel_size;
  if (lane >= taps) return;
  const int group = warp % (C / 8), first = warp / (C / 8);  // of the warp's channels, the first one's slot
  const float* channel = partial + group * B::kWeightFloats + 8 * C + first * kTapsPitch + lane;
  float* depthwise = reinterpret_cast<float*>(job.depthwise_partial) + (int64_t(blockIdx.x) * C + warp) * taps + lane;
#pragma unroll
  for (int i = 0; i < C; i += B::kWarps) depthwise[i * taps] = sum_over_warps(channel + i / (C / 8) * kTapsPitch);
}

template <int C, bool kWeights, typename T, bool kExact>
__device__ void process(float (&dx)[Block<C, kWeights>::kPasses][8], float* shared, const GradJob& job,
                        const Place<C>& place, const Shape& shape) {
  constexpr int kThreads = Block<C, kWeights>::kThreads;
  // Unknown to the compiler, which would else compute addresses long before they are used, and spill them.
  int zero = 0;
  asm volatile("" : "+r"(zero));
  Place<C> at = place;
  at.y0 += zero;
  const Memory<C, kWeights> memory(shape, place.pad, shared + zero);
  copy_taps<C, kThreads>(memory.taps, reinterpret_cast<const float*>(job.depthwise), job.kernel_size, channel_slot<C>);
  copy_pointwise<C, kThreads>(memory.weights, reinterpret_cast<const float*>(job.pointwise));
  const Strips<C> strips(at, shape, job.dilation * (job.kernel_size / 2));
  load_gradient<C, kWeights, T, kExact>(memory, job, strips, at, shape);
  wait_for_copies();
  __syncthreads();
  compute_e<C, kWeights, kExact>(memory, strips, at);
  __syncthreads();
  differentiate<C, kWeights, kExact>(dx, memory, job, at, shape);
  __syncthreads();
  if constexpr (kWeights) {
    store_weight_partials<C>(job, memory.partial, memory.holds_all_warps(shape, at.pad));
    __syncthreads();  // the next convolution's weights will be there
  }
}

// Clears e and dz, whose pixels outside the picture stay zero, and loads x where weight gradients need it.
template <int C, bool kWeights, typename T>
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
    const Source<T> source(job.x, job.x_batch_stride, job.stats, shape, at.picture);
    load_tile<C, kThreads>(memory.x, source, at, shape, memory.pitch, memory.plane,
                           channel_slot<C>);
  }
  __syncthreads();
}

// Stores relu'(x) · dx; returns this lane's {Σ dx, Σ dx · (x − mean)}, or {Σ dx, Σ dx · (x − mean) · rstd} where the
// tile of x is there and need not be read again.
template <int C, bool kWeights, typename T>
__device__ float2 store_dx(T* target, const float (&dx)[Block<C, kWeights>::kPasses][8],
                           const Memory<C, kWeights>& memory, const Source<T>& source, const Place<C>& at,
                           const Shape& shape) {
  const int slot = lane_slot<C, kWeights>(), channel = slot_channel<C>(slot), width = shape.width;
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
      float4 x;
      if constexpr (kWeights) {
        const float* stored = memory.row(memory.x + slot * memory.plane, at, at.y0 + run.x);
        x = *reinterpret_cast<const float4*>(stored + kHalo + run.y + t);
      } else {
        x = load_row4(source.x + row, column, width, source.aligned);
        x.x -= mean, x.y -= mean, x.z -= mean, x.w -= mean;
      }
      const auto masked = [&](float x_, float dx_, int at_) {
        if (!(x_ > 0.f && at_ < width)) return 0.f;
        sums.x += dx_;
        sums.y = fmaf(dx_, x_, sums.y);
        return dx_;
      };
      const float4 v = make_float4(masked(x.x, dx[pass][t], column), masked(x.y, dx[pass][t + 1], column + 1),
                                   masked(x.z, dx[pass][t + 2], column + 2),
                                   masked(x.w, dx[pass][t + 3], column + 3));
      store_row4(target + row, column, width, width % 4 == 0, v);
    }
  }
  return sums;
}

// Grid: (parts, splits, states); a block processes every job of its state whose number leaves blockIdx.y when
// divided by splits.
template <int C, bool kWeights, typename T, bool kExact>
__global__ void __launch_bounds__(Block<C, kWeights>::kThreads, Block<C, kWeights>::kMinBlocks)
    backward_first_kernel(const __grid_constant__ BackwardLaunch launch) {
  extern __shared__ __align__(16) float shared[];
  const Shape& shape = launch.shape;
  const Place<C> place(shape, kFirstPad);
  const int first = blockIdx.z == 0 ? 0 : launch.ends[blockIdx.z - 1], end = launch.ends[blockIdx.z];
  const GradJob& common = launch.jobs[first];
  prepare<C, kWeights, T>(Memory<C, kWeights>(shape, kFirstPad, shared), common, place, shape);
  float dx[Block<C, kWeights>::kPasses][8] = {};
#pragma unroll 1
  for (int j = first + blockIdx.y; j < end; j += launch.splits) {
    if (!drawn::runs(launch.jobs[j].mixing)) continue;
    process<C, kWeights, T, kExact>(dx, shared, launch.jobs[j], place, shape);
  }
  const Source<T> source(common.x, common.x_batch_stride, common.stats, shape, place.picture);
  const int64_t picture = int64_t(C) * shape.height * shape.width;
  store_dx<C, kWeights>(
      reinterpret_cast<T*>(common.dx) + (int64_t(blockIdx.y) * shape.batch + place.picture) * picture, dx,
      Memory<C, kWeights>(shape, kFirstPad, shared), source, place, shape);
}

// Grid: (parts, jobs).
template <int C, bool kWeights, typename T, bool kExact>
__global__ void __launch_bounds__(Block<C, kWeights>::kThreads, Block<C, kWeights>::kMinBlocks)
    backward_second_kernel(const __grid_constant__ BackwardLaunch launch) {
  launching::let_next_begin();
  using B = Block<C, kWeights>;
  extern __shared__ __align__(16) float shared[];
  const Shape& shape = launch.shape;
  const GradJob& job = launch.jobs[blockIdx.y];
  if (!drawn::runs(job.mixing)) return;
  const Place<C> at(shape, kSecondPad);
  const Memory<C, kWeights> memory(shape, kSecondPad, shared);
  prepare<C, kWeights, T>(memory, job, at, shape);
  float dx[B::kPasses][8] = {};
  process<C, kWeights, T, kExact>(dx, shared, job, at, shape);

  const Source<T> source(job.x, job.x_batch_stride, job.stats, shape, at.picture);
  const int64_t picture = int64_t(at.picture) * C * shape.height * shape.width;
  float2 sums = store_dx<C, kWeights>(reinterpret_cast<T*>(job.dx) + picture, dx, memory, source, at, shape);
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
    if (kWeights) total.y /= __ldg(source.stats + channel).y;
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
  launching::await_kernel_before();
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

bool wants_weights(const std::vector<GradJob>& jobs) { return jobs.front().pointwise_partial != 0; }

template <typename F>
void with_variant(const Shape& shape, const std::vector<GradJob>& jobs, F f) {
  with_channels(shape, [&](auto channels) {
    storage::with_precision(shape.bf16, shape.exact, [&](auto type, auto exact) {
      if (wants_weights(jobs)) f(channels, std::true_type(), type, exact);
      else f(channels, std::false_type(), type, exact);
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

int dx_splits(const Shape& shape, int jobs, int states, bool wants_weights) {
  const int blocks = with_channels(shape, [&](auto channels) {
    constexpr int C = channels();
    return wants_weights ? Block<C, true>::kMinBlocks : Block<C, false>::kMinBlocks;
  });
  return std::clamp(blocks * multiprocessors() / (backward_parts(shape) * states), 1, jobs);
}

void backward_first(const Shape& shape, const std::vector<GradJob>& jobs, int splits, Address stream) {
  if (jobs.size() > kMaxGradJobs) throw std::invalid_argument("too many convolutions leave these states");
  BackwardLaunch parameters{shape, splits, {}, {}};
  // By state, and the long ones first, so that the splits, which take turns, get equal shares.
  int states = 0, count = 0;
  std::vector<GradJob> rest = jobs;
  while (!rest.empty()) {
    if (states == kMaxStates) throw std::invalid_argument("convolutions of too many states");
    const Address dx = rest.front().dx;
    const auto others = std::stable_partition(rest.begin(), rest.end(), [&](const GradJob& job) { return job.dx == dx; });
    std::stable_sort(rest.begin(), others, [](const GradJob& a, const GradJob& b) {
      return a.kernel_size * 4 + a.dilation > b.kernel_size * 4 + b.dilation;
    });
    std::copy(rest.begin(), others, parameters.jobs + count);
    parameters.ends[states++] = count += others - rest.begin();
    rest.erase(rest.begin(), others);
  }
  with_variant(shape, jobs, [&](auto channels, auto weights, auto type, auto exact) {
    using T = typename decltype(type)::type;
    constexpr int C = channels();
    constexpr bool kWeights = weights();
    launch(backward_first_kernel<C, kWeights, T, exact()>, dim3(tile_count<C>(shape), splits, states),
           Block<C, kWeights>::kThreads, Memory<C, kWeights>::floats(shape, kFirstPad) * sizeof(float), stream, parameters);
  });
}

void backward_second(const Shape& shape, const std::vector<GradJob>& jobs, Address stream) {
  for (size_t first = 0; first < jobs.size(); first += kMaxGradJobs) {
    const size_t count = std::min(jobs.size() - first, size_t(kMaxGradJobs));
    BackwardLaunch parameters{shape, 1, {}, {}};
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    with_variant(shape, jobs, [&](auto channels, auto weights, auto type, auto exact) {
      using T = typename decltype(type)::type;
      constexpr int C = channels();
      constexpr bool kWeights = weights();
      launch(backward_second_kernel<C, kWeights, T, exact()>, dim3(tile_count<C>(shape), count),
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
    launch_early(first_coefficients_kernel, dim3(shape.channels, size), 32, stream, parameters);
  }
}

}  // namespace cell_conv
