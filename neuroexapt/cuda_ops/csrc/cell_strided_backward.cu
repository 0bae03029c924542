// The backward convolution stage of a reduction cell; cell_strided.h has the legend.
//
// A block owns 16 channels of the state on a tile of some rows and goes through all convolutions, so the gradient of
// its pixels stays in registers from the first to the last. For each convolution it forms dz from g and z, of all
// output channels, and e = W_pwᵀ · dz of its own channels on the tensor cores, both with their halo in shared memory.
// From e follow, in windows of registers, the gradients of x and of the depthwise weights; the pointwise weights'
// takes dz and the depthwise outputs, computed again, to the tensor cores.
//
// The pixels of x lie in four planes, by whether their row and column are even: then neighbouring outputs read
// neighbours, and a convolution of dilation 2 reads but the first plane.

#include "cell_strided_common.cuh"
#include "drawn.cuh"

namespace cell_strided {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChannels = 16;                    // of the state, a block's share
constexpr int kRows = 8;                         // output rows of a tile
constexpr int kHalo = 2;                         // and of what is kept above and below them
constexpr int kStoredRows = kRows + 2 * kHalo;   // of dz and e
constexpr int kMaxJobs = 32, kMaxStates = 4;     // of a launch

struct Range {
  Address x;
  int64_t x_batch_stride;
  Address dx;
  int first, count;  // of the jobs
};

struct Launch {
  Shape shape;
  Range states[kMaxStates];
  GradJob jobs[kMaxJobs];
};

// Shared memory, in floats. Pitches are such that windows and operands are loaded without bank conflicts.
template <int C>
struct Shared {
  static constexpr int kPitch = C == 64 ? 16 : 20;  // of a row of x or e, from two columns left of the tile on
  // Rows of x by whether row and column are even, from 4, 2, 1 and 1 rows above the tile on.
  static constexpr int kEvenEven = 0, kEvenOdd = 12, kOddEven = 22, kOddOdd = 31, kRowsOfX = 40;
  static constexpr int kPlaneRemainder = C == 64 ? 8 : 16;
  static constexpr int kPlaneOfX = pad_to_bank(kRowsOfX * kPitch, kPlaneRemainder);
  static constexpr int kPlaneOfE = pad_to_bank(kStoredRows * kPitch, kPlaneRemainder);
  static constexpr int kPitchOfDz = pad_to_bank(kStoredRows * kWidth<C>, 4);
  static constexpr int kPitchOfDepthwise = pad_to_bank(kRows * kWidth<C>, 4);
  static constexpr int kPitchOfWeight = 24;

  static constexpr int kX = 0;
  static constexpr int kE = kX + kChannels * kPlaneOfX;
  static constexpr int kDz = kE + kChannels * kPlaneOfE;
  static constexpr int kDepthwise = kDz + C * kPitchOfDz;
  static constexpr int kWeight = kDepthwise + kChannels * kPitchOfDepthwise;
  static constexpr int kTaps = kWeight + C * kPitchOfWeight;
  static constexpr int kFloats = kTaps + kChannels * kTapsPitch;
};

template <int C>
struct Place {
  int out_height, out_width, picture, y0, first_channel;

  __device__ explicit Place(const Shape& shape)
      : out_height((shape.height + 1) / 2), out_width(shape.width / 2) {
    const int tiles = ceil_div(out_height, kRows);
    picture = blockIdx.x / tiles;
    y0 = blockIdx.x % tiles * kRows;
    first_channel = blockIdx.y % (C / kChannels) * kChannels;
  }

  // The stored rows that lie inside the picture, of `halo` rows around the tile: from, and past the last.
  __device__ int from(int halo) const { return kHalo - min(halo, y0); }
  __device__ int to(int halo) const { return min(kHalo + kRows + halo, out_height - y0 + kHalo); }
};

// Rows of e around a tile that its pixels of x are read by.
__device__ int halo_of(const GradJob& job) { return job.dilation == 2 ? job.kernel_size / 2 : 1; }

// A thread's share of a tile in the passes over windows: kCount strips of one channel, whose lanes are neighbours.
template <int C>
struct Strips {
  static constexpr int kRowsOfWarp = 32 / (2 * kStripsPerRow<C>);
  static constexpr int kCount = kRows / kRowsOfWarp;
  int channel, row, column;  // of the first; the others are kRowsOfWarp rows apart

  __device__ Strips() : Strips(thread_index()) {}

 private:
  __device__ explicit Strips(int thread)
      : channel(thread / 32 * 2 + thread / kStripsPerRow<C> % 2),
        row(thread % 32 / (2 * kStripsPerRow<C>)),
        column(thread % kStripsPerRow<C> * kStrip) {}
};

// Adds up the first Size values of the lanes that share a channel. Each is left with the sums `first` to
// `first + count` at the front of its array: a step exchanges half of the values with another lane.
struct Owned {
  int first, count;
};

template <int C, int Size, int Step = 0, int N>
__device__ void reduce_scatter(float (&values)[N], Owned& owned) {
  if constexpr (Step < 4) {
    constexpr int kOfChannel = kStripsPerRow<C>;  // the lanes' bit that tells two channels apart
    constexpr int kBits[] = {16, 8, C == 64 ? 4 : 2, 1};
    static_assert(kBits[2] != kOfChannel);
    constexpr int kHalf = (Size + 1) / 2;
    const bool upper = threadIdx.x & kBits[Step];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float above = i + kHalf < Size ? values[i + kHalf] : 0.f;
      values[i] = (upper ? above : values[i]) + __shfl_xor_sync(~0u, upper ? values[i] : above, kBits[Step]);
    }
    owned = upper ? Owned{owned.first + kHalf, owned.count - kHalf} : Owned{owned.first, min(owned.count, kHalf)};
    reduce_scatter<C, kHalf, Step + 1>(values, owned);
  }
}

// relu(x) of the tile with its halo, into planes that are zero before.
template <int C, typename T>
__device__ void load_x(float* planes, const Range& state, const Shape& shape, const Place<C>& at) {
  using Shared = Shared<C>;
  constexpr int kQuads = kWidth<C> / 2, kFirst = -4, kCount = 2 * kRows + 7;
  constexpr int kItems = kChannels * kCount * kQuads, kBatch = 8;
  const T* x = reinterpret_cast<const T*>(state.x) + at.picture * state.x_batch_stride +
               int64_t(at.first_channel) * shape.height * shape.width;
  for (int first = threadIdx.x; first < kItems; first += kBatch * kThreads) {
    float4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int item = first + i * kThreads, quad = item % kQuads, channel = item / kQuads / kCount;
      const int y = 2 * at.y0 + kFirst + item / kQuads % kCount;
      v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (item < kItems && unsigned(y) < unsigned(shape.height) && 4 * quad < shape.width) {
        v[i] = load4(x + (channel * shape.height + y) * shape.width + 4 * quad);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int item = first + i * kThreads, quad = item % kQuads, channel = item / kQuads / kCount;
      const int row = item / kQuads % kCount + kFirst;  // from the tile's first
      if (item >= kItems) break;
      const float4 a = relu4(v[i]);
      float* plane = planes + channel * Shared::kPlaneOfX + 2 * quad;
      const bool odd = row & 1;
      if (odd ? row >= -1 && row < 2 * kRows : true) {
        float* even_columns = plane + (odd ? Shared::kOddEven + (row + 1) / 2 : Shared::kEvenEven + (row + 4) / 2) *
                                          Shared::kPitch;
        *reinterpret_cast<float2*>(even_columns + 2) = make_float2(a.x, a.z);
      }
      if (odd ? row >= -1 && row < 2 * kRows : row >= -2 && row <= 2 * kRows) {
        float* odd_columns = plane + (odd ? Shared::kOddOdd + (row + 1) / 2 : Shared::kEvenOdd + (row + 2) / 2) *
                                         Shared::kPitch;
        odd_columns[1] = a.y, odd_columns[2] = a.w;
      }
    }
  }
}

// What is loaded of a convolution: g and z on the tile with its halo. A thread stays in its row and column, so that
// little has to be computed for each channel. All at once they would not fit in registers beside the gradients of x.
template <int C, typename T>
struct Loads {
  static constexpr int kQuads = kWidth<C> / 4;
  static constexpr int kChannelsAtOnce = kThreads / (kStoredRows * kQuads);
  static constexpr int kCount = ceil_div(C, kChannelsAtOnce);
  static constexpr int kBatch = 4;  // in flight
  float4 g[kBatch], z[kBatch];

  struct Quad {
    int channel, row, column, offset;  // of the first
    bool exists;

    __device__ Quad(const GradJob& job, const Place<C>& at) : Quad(thread_index(), halo_of(job), at) {}
    __device__ bool has(int i) const { return exists && channel + i * kChannelsAtOnce < C; }

   private:
    __device__ Quad(int thread, int halo, const Place<C>& at)
        : channel(thread / (kStoredRows * kQuads)),
          row(thread / kQuads % kStoredRows),
          column(thread % kQuads * 4),
          offset((channel * at.out_height + at.y0 - kHalo + row) * at.out_width + column),
          exists(channel < kChannelsAtOnce && at.from(halo) <= row && row < at.to(halo) && column < at.out_width) {}
  };

  static __device__ const T* g_of(const GradJob& job, const Place<C>& at) {
    return reinterpret_cast<const T*>(job.g) + at.picture * job.g_batch_stride;
  }
  static __device__ const T* z_of(const GradJob& job, const Place<C>& at) {
    return reinterpret_cast<const T*>(job.z) + int64_t(at.picture) * C * at.out_height * at.out_width;
  }

  __device__ void load(const GradJob& job, const Place<C>& at, int first) {
    const Quad quad(job, at);
    const T *g_quad = g_of(job, at) + quad.offset, *z_quad = z_of(job, at) + quad.offset;
    const int step = kChannelsAtOnce * at.out_height * at.out_width;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (quad.has(first + i)) g[i] = load4(g_quad + (first + i) * step), z[i] = load4(z_quad + (first + i) * step);
    }
  }

  // Of the next convolution, into the L2 cache; a line holds eight quads.
  static __device__ void prefetch(const GradJob& job, const Place<C>& at) {
    const Quad quad(job, at);
    if (threadIdx.x % 8 != 0) return;
    const T *g_quad = g_of(job, at) + quad.offset, *z_quad = z_of(job, at) + quad.offset;
    const int step = kChannelsAtOnce * at.out_height * at.out_width;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (quad.has(i)) prefetch_line(g_quad + i * step), prefetch_line(z_quad + i * step);
    }
  }

  static __device__ void prefetch_line(const T* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

  __device__ void store_dz(float* dz, const GradJob& job, const Place<C>& at, int first) const {
    const Quad quad(job, at);
    const float4* coefs = reinterpret_cast<const float4*>(job.coef) + quad.channel;
    float* target = dz + quad.channel * Shared<C>::kPitchOfDz + quad.row * kWidth<C> + quad.column;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!quad.has(first + i)) continue;
      const float4 coef = __ldg(coefs + (first + i) * kChannelsAtOnce);
      *reinterpret_cast<float4*>(target + (first + i) * kChannelsAtOnce * Shared<C>::kPitchOfDz) =
          make_float4(fmaf(coef.x, g[i].x, fmaf(coef.y, z[i].x, coef.z)),
                      fmaf(coef.x, g[i].y, fmaf(coef.y, z[i].y, coef.z)),
                      fmaf(coef.x, g[i].z, fmaf(coef.y, z[i].z, coef.z)),
                      fmaf(coef.x, g[i].w, fmaf(coef.y, z[i].w, coef.z)));
    }
  }
};

// The weights of the block's channels on their way to shared memory, W_pw [C, kPitchOfWeight] and taps [kChannels,
// kTapsPitch]: asked for together with dz. Of the taps a warp has every kWarps-th channel and a lane one of each.
template <int C, bool kExact>
struct Weights {
  static constexpr int kQuads = kChannels / 4;  // of a row
  static_assert(C * kQuads <= kThreads, "a thread has one quad at most");
  float4 pointwise;
  float taps[kChannels / kWarps];

  __device__ void load(const GradJob& job, int first_channel) {
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
    const float* weight = reinterpret_cast<const float*>(job.pointwise) + first_channel;
    if (thread < C * kQuads) pointwise = load4(weight + thread / kQuads * C + thread % kQuads * 4);
    const int size = job.kernel_size * job.kernel_size;
    if (lane >= size) return;
    const float* depthwise = reinterpret_cast<const float*>(job.depthwise) + (first_channel + warp) * size + lane;
#pragma unroll
    for (int i = 0; i < kChannels / kWarps; ++i) taps[i] = __ldg(depthwise + i * kWarps * size);
  }
  __device__ void store(float* weight_target, float* taps_target, int kernel_size) const {
    const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
    float* quad = weight_target + thread / kQuads * Shared<C>::kPitchOfWeight + thread % kQuads * 4;
    if (thread < C * kQuads) *reinterpret_cast<float4*>(quad) = unbiased<kExact>(pointwise);
    if (lane >= kernel_size * kernel_size) return;
    taps_target += warp * kTapsPitch + (kernel_size == 5 ? tap_position(lane, 5) : tap_position(lane, 3));
#pragma unroll
    for (int i = 0; i < kChannels / kWarps; ++i) taps_target[i * kWarps * kTapsPitch] = taps[i];
  }
};

// e = W_pwᵀ · dz on the stored rows [from, to). A warp takes eight quads at a time.
template <int C, bool kExact>
__device__ void compute_e(float* e, const float* dz, const float* weight, int from, int to) {
  using Shared = Shared<C>;
  constexpr int kQuads = kWidth<C> / 4;
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4, count = (to - from) * kQuads;
  for (int first = threadIdx.x / 32 * 8; first < count; first += kWarps * 8) {
    const float* w = weight + q * Shared::kPitchOfWeight + g;
    const float* column = dz + q * Shared::kPitchOfDz + from * kWidth<C> +
                          4 * min(first + place_of_column(g), count - 1);
    float sums[4][4] = {};
#pragma unroll 2
    for (int o = 0; o < C; o += 8) {
      Fragment<4, kExact> left;
#pragma unroll
      for (int i = 0; i < 4; ++i) left.set_cut(i, w[(o + i / 2 * 4) * Shared::kPitchOfWeight + i % 2 * 8]);
      const float4 upper = read4(column + o * Shared::kPitchOfDz), lower = read4(column + (o + 4) * Shared::kPitchOfDz);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        Fragment<2, kExact> right;
        right.set_cut(0, component(upper, t)), right.set_cut(1, component(lower, t));
        multiply<kExact>(sums[t], left, right);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int quad = first + place_of_column(2 * q + i);
      if (quad >= count) continue;
      float* target = e + (from + quad / kQuads) * Shared::kPitch + quad % kQuads * 4 + 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* at = target + (g + 8 * h) * Shared::kPlaneOfE;
        const int r = 2 * h + i;
        *reinterpret_cast<float2*>(at) = make_float2(sums[0][r], sums[1][r]);
        *reinterpret_cast<float2*>(at + 2) = make_float2(sums[2][r], sums[3][r]);
      }
    }
  }
}

// Of a strip's pixels of x: by the parity of row and column, four neighbours each.
using Gradient = float[2][2][kStrip];

// gradient += W_dwᵀ ⋆ e of a strip; `e` points two columns left of it, in its row.
template <int C, int K, int D>
__device__ void gather(Gradient& gradient, const float* e, const float* taps) {
#pragma unroll
  for (int dy = -(K / 2); dy <= K / 2; ++dy) {  // of the row of e
    if (D == 1 && (dy < -(K / 4) || dy > 1)) continue;
    float window[8];
    load_window(window, e + dy * Shared<C>::kPitch);
#pragma unroll
    for (int a = 0; a < (D == 1 ? 2 : 1); ++a) {
      const int ky = D == 1 ? a + K / 2 - 2 * dy : K / 2 - dy;
      if (ky < 0 || ky >= K) continue;
      float w[K];
      load_tap_row<K>(w, taps, ky);
#pragma unroll
      for (int b = 0; b < (D == 1 ? 2 : 1); ++b) {
#pragma unroll
        for (int dx = -(K / 2); dx <= K / 2; ++dx) {
          const int kx = D == 1 ? b + K / 2 - 2 * dx : K / 2 - dx;
          if (kx < 0 || kx >= K) continue;
#pragma unroll
          for (int t = 0; t < kStrip; ++t) gradient[a][b][t] = fmaf(w[kx], window[t + dx + 2], gradient[a][b][t]);
        }
      }
    }
  }
}

// The depthwise outputs of a strip, and its share of the depthwise weights' gradient.
template <int C, int K, int D>
__device__ void convolve_again(float (&depthwise)[kStrip], float (&gradient)[K * K], const float* x, const float* e,
                               const float* taps) {
  using Shared = Shared<C>;
  const float2 left = *reinterpret_cast<const float2*>(e + 2), right = *reinterpret_cast<const float2*>(e + 4);
  const float own[kStrip] = {left.x, left.y, right.x, right.y};
#pragma unroll
  for (int ky = 0; ky < K; ++ky) {
    const int dy = ky - K / 2;
    const bool odd_row = D == 1 && dy % 2 != 0;
    const int even_columns = odd_row ? Shared::kOddEven + (dy + 1) / 2 : Shared::kEvenEven + dy / (3 - D) + 2;
    const int odd_columns = odd_row ? Shared::kOddOdd + (dy + 1) / 2 : Shared::kEvenOdd + dy / 2 + 1;
    float w[K];
    load_tap_row<K>(w, taps, ky);
#pragma unroll
    for (int odd = 0; odd < (D == 1 ? 2 : 1); ++odd) {  // columns
      float window[8];
      load_window(window, x + (odd ? odd_columns : even_columns) * Shared::kPitch);
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        const int dx = kx - K / 2;
        if (D == 1 && (dx & 1) != odd) continue;
#pragma unroll
        for (int t = 0; t < kStrip; ++t) {
          const float v = window[t + (odd ? (dx + 1) / 2 : dx / (3 - D) + 2)];
          depthwise[t] = fmaf(w[kx], v, depthwise[t]);
          gradient[ky * K + kx] = fmaf(own[t], v, gradient[ky * K + kx]);
        }
      }
    }
  }
}

template <int C>
using Gradients = Gradient[Strips<C>::kCount];

// What follows from e: the gradient of x, and where they are wanted the depthwise outputs and the gradient of the
// depthwise weights.
template <int C, int K, int D>
__device__ void pass_windows(Gradients<C>& gradients, float* shared, const GradJob& job, int first_channel) {
  using Shared = Shared<C>;
  const Strips<C> strips;
  const float* e = shared + Shared::kE + strips.channel * Shared::kPlaneOfE +
                   (strips.row + kHalo) * Shared::kPitch + strips.column;
  const float* taps = shared + Shared::kTaps + strips.channel * kTapsPitch;
#pragma unroll
  for (int i = 0; i < Strips<C>::kCount; ++i) {
    gather<C, K, D>(gradients[i], e + i * Strips<C>::kRowsOfWarp * Shared::kPitch, taps);
  }
  if (job.pointwise_partial == 0) return;
  const float* x =
      shared + Shared::kX + strips.channel * Shared::kPlaneOfX + strips.row * Shared::kPitch + strips.column;
  float* target = shared + Shared::kDepthwise + strips.channel * Shared::kPitchOfDepthwise +
                  strips.row * kWidth<C> + strips.column;
  float gradient[K * K] = {};
#pragma unroll 1
  for (int i = 0; i < Strips<C>::kCount; ++i) {
    const int rows = i * Strips<C>::kRowsOfWarp;
    float depthwise[kStrip] = {};
    convolve_again<C, K, D>(depthwise, gradient, x + rows * Shared::kPitch, e + rows * Shared::kPitch, taps);
    *reinterpret_cast<float4*>(target + rows * kWidth<C>) =
        make_float4(depthwise[0], depthwise[1], depthwise[2], depthwise[3]);
  }
  Owned owned{0, K * K};
  reduce_scatter<C, K * K>(gradient, owned);
  float* partial = reinterpret_cast<float*>(job.depthwise_partial) +
                   (int64_t(blockIdx.x) * C + first_channel + strips.channel) * K * K;
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // 16 lanes own at most two of 25
    if (i < owned.count) partial[owned.first + i] = gradient[i];
  }
}

// dW_pw = dz · depthwise outputsᵀ over the tile, [C, kChannels] of [C, C]. A warp takes 16 by 8 of them.
template <int C, bool kExact>
__device__ void pointwise_gradient(float* partial, const float* dz, const float* depthwise) {
  using Shared = Shared<C>;
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4;
  for (int task = threadIdx.x / 32; task < C / 8; task += kWarps) {
    const int o = task / 2 * 16 + g, c = task % 2 * 8;
    const float* left_row = dz + o * Shared::kPitchOfDz + kHalo * kWidth<C>;
    const float* right_row = depthwise + (c + g) * Shared::kPitchOfDepthwise;
    float sums[4] = {};
#pragma unroll 2
    for (int i = 0; i < kRows * kWidth<C> / 16; ++i) {  // 16 pixels, of which a lane contracts four
      const int pixel = i / 2 * 32 + 8 * q + i % 2 * 4;
      const float4 upper = read4(left_row + pixel), lower = read4(left_row + 8 * Shared::kPitchOfDz + pixel);
      const float4 v = read4(right_row + pixel);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        Fragment<4, kExact> left;
        Fragment<2, kExact> right;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          left.set_cut(2 * k, component(upper, 2 * step + k));
          left.set_cut(2 * k + 1, component(lower, 2 * step + k));
          right.set_cut(k, component(v, 2 * step + k));
        }
        multiply<kExact>(sums, left, right);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      *reinterpret_cast<float2*>(partial + (o + 8 * h) * C + c + 2 * q) =
          make_float2(unbiased<kExact>(sums[2 * h]), unbiased<kExact>(sums[2 * h + 1]));
    }
  }
}

// dx = relu'(x) · gradient.
template <int C, typename T>
__device__ void store_dx(T* dx, const Gradients<C>& gradients, const float* shared, const Shape& shape,
                         const Place<C>& at) {
  using Shared = Shared<C>;
  const Strips<C> strips;
  if (strips.column >= at.out_width) return;
  dx += (int64_t(at.picture) * C + at.first_channel + strips.channel) * shape.height * shape.width;
#pragma unroll
  for (int i = 0; i < Strips<C>::kCount; ++i) {
    const int row = strips.row + i * Strips<C>::kRowsOfWarp;
    const float* x = shared + Shared::kX + strips.channel * Shared::kPlaneOfX + row * Shared::kPitch + strips.column;
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      const int y = 2 * (at.y0 + row) + a;
      if (y >= shape.height) continue;
      const float* even = x + (a == 0 ? Shared::kEvenEven + 2 : Shared::kOddEven + 1) * Shared::kPitch + 2;
      const float* odd = x + (a == 0 ? Shared::kEvenOdd + 1 : Shared::kOddOdd + 1) * Shared::kPitch + 1;
      float v[2 * kStrip];
#pragma unroll
      for (int t = 0; t < kStrip; ++t) {
        v[2 * t] = even[t] == 0.f ? 0.f : gradients[i][a][0][t];
        v[2 * t + 1] = odd[t] == 0.f ? 0.f : gradients[i][a][1][t];
      }
      T* target = dx + y * shape.width + 2 * strips.column;
      store4(target, make_float4(v[0], v[1], v[2], v[3]));
      store4(target + 4, make_float4(v[4], v[5], v[6], v[7]));
    }
  }
}

// Grid: (parts, shares of the channels of every state).
template <int C, typename T, bool kExact>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ Launch launch) {
  using Shared = Shared<C>;
  extern __shared__ __align__(16) float shared[];
  const Shape& shape = launch.shape;
  const Range& state = launch.states[blockIdx.y / (C / kChannels)];
  const Place<C> at(shape);
  float* dz = shared + Shared::kDz;

  // What no convolution writes stays zero: all that lies outside the picture.
  for (int i = threadIdx.x; i < Shared::kFloats / 4; i += kThreads) {
    reinterpret_cast<float4*>(shared)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  __syncthreads();
  load_x<C, T>(shared + Shared::kX, state, shape, at);
  Gradients<C> gradients = {};
#pragma unroll 1
  for (int i = state.first; i < state.first + state.count; ++i) {
    const GradJob& job = launch.jobs[i];
    if (!drawn::runs(job.mixing)) continue;
    const int from = at.from(halo_of(job)), to = at.to(halo_of(job));
    Weights<C, kExact> weights;
    weights.load(job, at.first_channel);
    Loads<C, T> loads;
    loads.load(job, at, 0);
    __syncthreads();  // dz and the weights of the convolution before have been read
    weights.store(shared + Shared::kWeight, shared + Shared::kTaps, job.kernel_size);
    loads.store_dz(dz, job, at, 0);
#pragma unroll
    for (int first = Loads<C, T>::kBatch; first < Loads<C, T>::kCount; first += Loads<C, T>::kBatch) {
      loads.load(job, at, first);
      loads.store_dz(dz, job, at, first);
    }
    if (i + 1 < state.first + state.count) Loads<C, T>::prefetch(launch.jobs[i + 1], at);
    __syncthreads();
    compute_e<C, kExact>(shared + Shared::kE, dz, shared + Shared::kWeight, from, to);
    __syncthreads();
    switch (job.kernel_size * 2 + job.dilation) {
      case 7: pass_windows<C, 3, 1>(gradients, shared, job, at.first_channel); break;
      case 8: pass_windows<C, 3, 2>(gradients, shared, job, at.first_channel); break;
      case 11: pass_windows<C, 5, 1>(gradients, shared, job, at.first_channel); break;
      default: pass_windows<C, 5, 2>(gradients, shared, job, at.first_channel);
    }
    if (job.pointwise_partial == 0) continue;
    __syncthreads();
    pointwise_gradient<C, kExact>(
        reinterpret_cast<float*>(job.pointwise_partial) + int64_t(blockIdx.x) * C * C + at.first_channel, dz,
        shared + Shared::kDepthwise);
  }
  // Where no convolution ran, nobody waited for the tile of x, but then all gradients are zero.
  store_dx<C>(reinterpret_cast<T*>(state.dx), gradients, shared, shape, at);
}

}  // namespace

bool backward_takes(const Shape& shape) {
  return specialise(shape, [&](auto channels, auto, auto) { return shape.width / 2 <= kWidth<channels()>; });
}

int backward_parts(const Shape& shape) { return shape.batch * ceil_div((shape.height + 1) / 2, kRows); }

void backward(const Shape& shape, const std::vector<StateGrad>& states, Address stream) {
  for (size_t first = 0, last; first < states.size(); first = last) {
    Launch parameters{shape, {}, {}};
    size_t jobs = 0;
    for (last = first; last < states.size() && last - first < kMaxStates; ++last) {
      const StateGrad& state = states[last];
      if (state.jobs.size() > kMaxJobs) throw std::invalid_argument("too many convolutions leave one state");
      if (jobs + state.jobs.size() > kMaxJobs) break;
      parameters.states[last - first] = {state.x, state.x_batch_stride, state.dx, int(jobs), int(state.jobs.size())};
      std::copy(state.jobs.begin(), state.jobs.end(), parameters.jobs + jobs);
      jobs += state.jobs.size();
    }
    specialise(shape, [&](auto channels, auto type, auto exact) {
      constexpr int C = channels();
      launch(backward_kernel<C, typename decltype(type)::type, exact()>,
             dim3(backward_parts(shape), (last - first) * (C / kChannels)), kThreads,
             Shared<C>::kFloats * sizeof(float), stream, parameters);
    });
  }
}

}  // namespace cell_strided
