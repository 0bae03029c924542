// Separable convolution in fp32 for the shapes of a search network; sepconv.h has the legend.
//
// A picture stays in L2 and the arithmetic takes some 2 µs of a Hopper chip, so loads on the chip decide.
// A block therefore keeps its tile in shared memory with a halo of zeros, and a thread computes four
// neighbouring pixels from a window of registers: k = 5 takes two 16-byte loads for twenty products,
// where a kernel without shared memory (sepconv_triton.py) takes twenty loads. Products are exact fp32: the
// pointwise convolution takes 1 µs on the ordinary units when each thread keeps 4 x 4 sums. At 64 channels of
// 8 x 8 pixels a block has so little to do that latency decides: all weights are fetched together
// with the tile, ahead of the first barrier.
//
// Backward is one launch for all three gradients and a second that adds up the tiles' weight gradients in
// a fixed order. The gradient before the pointwise convolution, e = W_pwᵀ · dy, is computed with its
// halo (1.5 times the products at 8 rows), which saves the trip through memory that its neighbours
// would otherwise need. Blocks split the input channels, which repeats no arithmetic.

#include "sepconv.h"

#include <algorithm>
#include <stdexcept>

#include "arithmetic.cuh"
#include "launch.cuh"
#include "storage.cuh"

namespace sepconv {
namespace {

using arithmetic::ceil_div;
using arithmetic::relu;
using launching::check;
using launching::launch;
using storage::input;
using storage::load4;
using storage::output;

constexpr int kThreads = 256;
constexpr int kChannels = 16;                    // that a block of the backward pass owns
constexpr int kLanes = kThreads / kChannels;     // threads that share a channel there
constexpr int kReduceColumns = 32, kReduceSplits = 16;

__host__ __device__ constexpr int round_up_4(int n) { return ceil_div(n, 4) * 4; }

template <typename Job>
struct Launch {
  Shape shape;
  int rows;
  Job jobs[kMaxJobs];
};

template <int K, int S, int D>
struct Conv {
  static constexpr int kPad = D * (K / 2);
  static constexpr int kHalo = (kPad + S - 1) / S;  // rows and columns of e around a tile
  static constexpr int kWindow = round_up_4(3 * S + 2 * kPad + 1);  // of x, for four outputs
  static constexpr int kGradWindow = S == 1 ? kWindow : (3 + kPad) / 2 + kHalo + 1;  // of e, for four dx

  const Shape& shape;
  int rows;

  __device__ int x_rows() const { return (rows - 1) * S + 2 * kPad + 1; }
  __device__ int x_pitch() const { return shape.W + round_up_4(2 * kPad); }
  __device__ int e_rows() const { return rows + 2 * kHalo; }
  __device__ int e_pitch() const { return shape.OW + round_up_4(2 * kHalo); }
  __device__ int pixels() const { return rows * shape.OW; }
  __device__ int tiles() const { return shape.OH / rows; }
  // Rows of e and of the block's dy that lie inside the picture: from, and past the last.
  __device__ int e_from() const { return max(0, kHalo - first_row()); }
  __device__ int e_to() const { return min(e_rows(), shape.OH - first_row() + kHalo); }
  __device__ int picture() const { return blockIdx.x / tiles(); }
  __device__ int first_row() const { return blockIdx.x % tiles() * rows; }
};

// Steps through (plane, row, four neighbouring pixels) by the number of threads, without division.
struct Walk {
  int quads, rows;
  int quad, row, plane;
  int quad_step, row_step, plane_step;

  __device__ Walk(int width, int rows_)
      : quads(width / 4),
        rows(rows_),
        quad(threadIdx.x % quads),
        row(threadIdx.x / quads % rows),
        plane(threadIdx.x / quads / rows),
        quad_step(kThreads % quads),
        row_step(kThreads / quads % rows),
        plane_step(kThreads / quads / rows) {}

  __device__ void next() {
    quad += quad_step;
    row += row_step;
    plane += plane_step;
    if (quad >= quads) quad -= quads, ++row;
    if (row >= rows) row -= rows, ++plane;
  }
};

__device__ float4& as_float4(float* p) { return *reinterpret_cast<float4*>(p); }

// Four floats at an address that is Offset past a multiple of four.
template <int Offset>
__device__ void store4(float* target, float4 v) {
  if constexpr (Offset % 4 == 0) {
    as_float4(target) = v;
  } else if constexpr (Offset % 2 == 0) {
    *reinterpret_cast<float2*>(target) = make_float2(v.x, v.y);
    *reinterpret_cast<float2*>(target + 2) = make_float2(v.z, v.w);
  } else {
    target[0] = v.x, target[1] = v.y, target[2] = v.z, target[3] = v.w;
  }
}

// N floats, Vector (4 or 2) at a time.
template <int Vector, int N>
__device__ void load_window(float (&window)[N], const float* source) {
#pragma unroll
  for (int i = 0; i < N; i += Vector) {
    if constexpr (Vector == 4) {
      const float4 v = *reinterpret_cast<const float4*>(source + i);
      window[i] = v.x, window[i + 1] = v.y, window[i + 2] = v.z, window[i + 3] = v.w;
    } else {
      const float2 v = *reinterpret_cast<const float2*>(source + i);
      window[i] = v.x, window[i + 1] = v.y;
    }
  }
}

__device__ void add_scaled(float (&sums)[4], float scale, float4 v) {
  sums[0] = fmaf(scale, v.x, sums[0]), sums[1] = fmaf(scale, v.y, sums[1]);
  sums[2] = fmaf(scale, v.z, sums[2]), sums[3] = fmaf(scale, v.w, sums[3]);
}

__device__ float4 float4_of(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

struct Range {
  int first, count;
};

// Adds up the first Size values of each of 2 · offset neighbouring threads, a power of two. Each is left with
// the sums of the range `owned`, at the front of its array: a step exchanges half of the values. Sizes are
// compile-time constants, since a loop over them is not unrolled and then indexes registers by branches.
template <int Size, int N>
__device__ void reduce_scatter(float (&values)[N], int offset, Range& owned) {
  if (offset == 0) return;
  constexpr int kHalf = (Size + 1) / 2;
  const bool upper = threadIdx.x & offset;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float above = i + kHalf < Size ? values[i + kHalf] : 0.f;
    values[i] = (upper ? above : values[i]) + __shfl_xor_sync(~0u, upper ? values[i] : above, offset);
  }
  if (upper) owned = Range{owned.first + kHalf, owned.count - kHalf};
  else owned.count = min(owned.count, kHalf);
  if constexpr (Size > 1) reduce_scatter<kHalf>(values, offset / 2, owned);
}

__device__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// The columns beside the picture: Left on its left, the rest of the pitch on its right.
template <int Left>
__device__ void zero_columns(float* tile, int rows, int width) {
  constexpr int kColumns = round_up_4(2 * Left);
  if constexpr (kColumns > 0) {
    for (int i = threadIdx.x; i < rows * kColumns; i += kThreads) {
      const int column = i % kColumns;
      tile[i / kColumns * (width + kColumns) + (column < Left ? column : width + column)] = 0.f;
    }
  }
}

// relu(x) of the tile's rows and halo into tile [channels, x_rows, x_pitch], zero outside the picture.
template <typename Conv>
__device__ void load_x(const Conv& conv, float* tile, const float* x, int channels, int top) {
  const int height = conv.shape.H, width = conv.shape.W;
  for (Walk at(width, conv.x_rows()); at.plane < channels; at.next()) {
    const int y = top + at.row;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (0 <= y && y < height) v = load4(x + (at.plane * height + y) * width + 4 * at.quad);
    if (conv.shape.relu) v = make_float4(relu(v.x), relu(v.y), relu(v.z), relu(v.w));
    float* row = tile + (at.plane * conv.x_rows() + at.row) * conv.x_pitch();
    store4<Conv::kPad>(row + Conv::kPad + 4 * at.quad, v);
  }
  zero_columns<Conv::kPad>(tile, channels * conv.x_rows(), width);
}

// Rows of `width` floats (a multiple of 4), `source_pitch` apart, into rows that are `pitch` apart.
__device__ void load_matrix(float* target, int pitch, const float* source, int source_pitch, int rows,
                            int width) {
  for (Walk at(width, rows); at.plane == 0; at.next()) {
    as_float4(target + at.row * pitch + 4 * at.quad) = load4(source + at.row * source_pitch + 4 * at.quad);
  }
}

template <int K>
__device__ void load_weights(float (&weights)[K * K], const float* source) {
#pragma unroll
  for (int i = 0; i < K * K; ++i) weights[i] = __ldg(source + i);
}

// Shared memory: x [C, x_rows, x_pitch], depthwise outputs [C, pixels], pointwise weights [O, C + 4]: so
// the rows of eight neighbouring outputs lie in different banks.
// Grid: (tiles of all pictures, jobs).
template <int K, int S, int D>
__global__ void __launch_bounds__(kThreads, 2) fwd_kernel(const __grid_constant__ Launch<Job> launch) {
  using Conv = Conv<K, S, D>;
  const Shape& shape = launch.shape;
  const Job& job = launch.jobs[blockIdx.y];
  const float* depthwise_weight = input(job.depthwise);
  const int rows = launch.rows, C = shape.C, O = shape.O;
  const Conv conv{shape, rows};
  extern __shared__ __align__(16) float shared[];
  float* tile = shared;
  float* depthwise = tile + C * conv.x_rows() * conv.x_pitch();
  float* weight = depthwise + C * conv.pixels();
  const int pitch = C + 4;

  const float* x = input(job.x) + int64_t(conv.picture()) * C * shape.H * shape.W;
  load_x(conv, tile, x, C, conv.first_row() * S - Conv::kPad);
  load_matrix(weight, pitch, input(job.pointwise), C, O, C);
  const int lanes = max(1, kThreads / C), groups = kThreads / lanes;  // a group of threads to a channel
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  int c = group < groups ? group : C;
  float w[K * K];
  if (c < C) load_weights<K>(w, depthwise_weight + c * K * K);  // in flight together with the tile
  __syncthreads();

  const int quads = shape.OW / 4;
  while (c < C) {
    for (int i = lane; i < rows * quads; i += lanes) {
      const int row = i / quads, quad = i % quads;
      const float* corner = tile + (c * conv.x_rows() + row * S) * conv.x_pitch() + 4 * S * quad;
      float d[4] = {};
#pragma unroll
      for (int ky = 0; ky < K; ++ky) {
        float window[Conv::kWindow];
        load_window<4>(window, corner + ky * D * conv.x_pitch());
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
#pragma unroll
          for (int t = 0; t < 4; ++t) d[t] = fmaf(w[ky * K + kx], window[t * S + kx * D], d[t]);
        }
      }
      as_float4(depthwise + c * conv.pixels() + 4 * i) = float4_of(d);
    }
    c += groups;
    if (c < C) load_weights<K>(w, depthwise_weight + c * K * K);
  }
  __syncthreads();

  float* y = output(job.y) + conv.picture() * job.y_batch_stride + conv.first_row() * shape.OW;
  const int pixel_quads = conv.pixels() / 4, out_plane = shape.OH * shape.OW;
  for (int i = threadIdx.x; i < O / 4 * pixel_quads; i += kThreads) {
    const int o = i / pixel_quads, pixel = i % pixel_quads * 4;  // outputs o, o + O / 4, …
    float sums[4][4] = {};
#pragma unroll 2
    for (int c = 0; c < C; c += 4) {
      float4 d[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) d[k] = as_float4(depthwise + (c + k) * conv.pixels() + pixel);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 v = as_float4(weight + (o + j * O / 4) * pitch + c);
        add_scaled(sums[j], v.x, d[0]), add_scaled(sums[j], v.y, d[1]);
        add_scaled(sums[j], v.z, d[2]), add_scaled(sums[j], v.w, d[3]);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) as_float4(y + (o + j * O / 4) * out_plane + pixel) = float4_of(sums[j]);
  }
}

// The gradient of y on the tile and its halo inside the picture.
template <typename Conv>
__device__ void load_dy(const Conv& conv, float* dy, const GradJob& job) {
  const Shape& shape = conv.shape;
  const int above = conv.e_from(), plane = conv.e_rows() * shape.OW, out_plane = shape.OH * shape.OW;
  const float* g = input(job.g) + conv.picture() * job.g_batch_stride;
  const float* z = input(job.z) + conv.picture() * job.z_batch_stride;
  for (Walk at(shape.OW, conv.e_to() - above); at.plane < shape.O; at.next()) {
    const int row = above + at.row, y = conv.first_row() - Conv::kHalo + row;
    const int pixel = at.plane * out_plane + y * shape.OW + 4 * at.quad;
    float4 v = load4(g + pixel);
    if (job.coef != 0) {
      const float4 coef = load4(input(job.coef) + 4 * at.plane), w = load4(z + pixel);
      v.x = fmaf(coef.x, v.x, fmaf(coef.y, w.x, coef.z)), v.y = fmaf(coef.x, v.y, fmaf(coef.y, w.y, coef.z));
      v.z = fmaf(coef.x, v.z, fmaf(coef.y, w.z, coef.z)), v.w = fmaf(coef.x, v.w, fmaf(coef.y, w.w, coef.z));
    }
    as_float4(dy + at.plane * plane + row * shape.OW + 4 * at.quad) = v;
  }
}

// e = W_pwᵀ · dy for this block's channels, on the tile and its halo; zero outside the picture.
template <typename Conv>
__device__ void compute_e(const Conv& conv, float* e, const float* dy, const float* weight) {
  const int O = conv.shape.O, width = conv.shape.OW, plane = conv.e_rows() * width;
  const int first = conv.e_from() * width, pixel_quads = conv.e_to() * width / 4 - first / 4;
  for (int i = threadIdx.x; i < kChannels / 2 * pixel_quads; i += kThreads) {
    const int c = i / pixel_quads * 2, pixel = first + i % pixel_quads * 4;
    float sums[2][4] = {};
#pragma unroll 8
    for (int o = 0; o < O; ++o) {
      const float2 w = *reinterpret_cast<const float2*>(weight + o * kChannels + c);
      const float4 g = *reinterpret_cast<const float4*>(dy + o * plane + pixel);
      add_scaled(sums[0], w.x, g), add_scaled(sums[1], w.y, g);
    }
    float* target = e + (c * conv.e_rows() + pixel / width) * conv.e_pitch() + Conv::kHalo + pixel % width;
    store4<Conv::kHalo>(target, float4_of(sums[0]));
    store4<Conv::kHalo>(target + conv.e_rows() * conv.e_pitch(), float4_of(sums[1]));
  }
}

// The rows of e outside the picture, and the columns beside it.
template <typename Conv>
__device__ void zero_border(const Conv& conv, float* e) {
  zero_columns<Conv::kHalo>(e, kChannels * conv.e_rows(), conv.shape.OW);
  const int above = conv.e_from(), outside = above + conv.e_rows() - conv.e_to();
  const int quads = conv.e_pitch() / 4;
  for (int i = threadIdx.x; i < kChannels * outside * quads; i += kThreads) {
    const int quad = i % quads, channel = i / quads / outside, nth = i / quads % outside;
    const int row = nth < above ? nth : nth + conv.e_to() - above;
    as_float4(e + (channel * conv.e_rows() + row) * conv.e_pitch() + 4 * quad) = float4();
  }
}

// One channel's depthwise outputs, and this lane's share of its depthwise weight gradient.
template <int K, int S, int D>
__device__ void recompute_depthwise(const Conv<K, S, D>& conv, float* depthwise, float (&grad)[K * K],
                                    const float* x, const float* e, const float (&w)[K * K], int lane) {
  using Conv = Conv<K, S, D>;
  const int quads = conv.shape.OW / 4;
  for (int i = lane; i < conv.rows * quads; i += kLanes) {
    const int row = i / quads, quad = i % quads;
    const float* corner = x + row * S * conv.x_pitch() + 4 * S * quad;
    const float* own = e + (row + Conv::kHalo) * conv.e_pitch() + Conv::kHalo + 4 * quad;
    float d[4] = {};
    const float g[4] = {own[0], own[1], own[2], own[3]};
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
      float window[Conv::kWindow];
      load_window<4>(window, corner + ky * D * conv.x_pitch());
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          d[t] = fmaf(w[ky * K + kx], window[t * S + kx * D], d[t]);
          grad[ky * K + kx] = fmaf(g[t], window[t * S + kx * D], grad[ky * K + kx]);
        }
      }
    }
    as_float4(depthwise + 4 * i) = float4_of(d);
  }
}

// dx of one channel: every input pixel gathers the outputs that read it.
template <int K, int S, int D>
__device__ void gather_dx(const Conv<K, S, D>& conv, float* dx, const float* x, const float* e,
                          const float (&w)[K * K], int lane) {
  using Conv = Conv<K, S, D>;
  const int quads = conv.shape.W / 4;
  const int rows = min(conv.rows * S, conv.shape.H - conv.first_row() * S);
  for (int i = lane; i < rows * quads; i += kLanes) {
    const int row = i / quads, quad = i % quads;
    float sums[4] = {};
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
      const int row_s = row + Conv::kPad - ky * D + S * Conv::kHalo;  // S times the row of e
      if (row_s % S != 0) continue;
      float window[Conv::kGradWindow];
      load_window<4 / S>(window, e + row_s / S * conv.e_pitch() + 4 / S * quad);
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const int column_s = t + Conv::kPad - kx * D + S * Conv::kHalo;
          if (column_s % S == 0) sums[t] = fmaf(w[ky * K + kx], window[column_s / S], sums[t]);
        }
      }
    }
    const float* at = x + (row + Conv::kPad) * conv.x_pitch() + Conv::kPad + 4 * quad;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (conv.shape.relu && at[t] == 0.f) sums[t] = 0.f;
    }
    as_float4(dx + 4 * i) = float4_of(sums);
  }
}

// dW_pw = dy · dᵀ over the tile: [O, kChannels] into rows of C. Lanes share the pixels of 4 x 4 weights.
__device__ void pointwise_gradient(float* partial, const float* dy, int dy_pitch, const float* depthwise,
                                   int pixels, int O, int C) {
  int lanes = kLanes;
  while (lanes * O > kThreads && lanes > 1) lanes /= 2;
  const int lane = threadIdx.x % lanes;
  for (int first = 0; first < O; first += kThreads / lanes) {
    const int item = first + threadIdx.x / lanes;
    const int o = item / 4 * 4, c = item % 4 * 4;
    float sums[16] = {};
    for (int pixel = item < O ? 4 * lane : pixels; pixel < pixels; pixel += 4 * lanes) {
      float4 d[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        d[k] = *reinterpret_cast<const float4*>(depthwise + (c + k) * pixels + pixel);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 g = *reinterpret_cast<const float4*>(dy + (o + j) * dy_pitch + pixel);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[4 * j + k] = dot4(g, d[k], sums[4 * j + k]);
      }
    }
    Range owned{0, 16};
    reduce_scatter<16>(sums, lanes / 2, owned);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int j = owned.first + i;
      if (item < O && i < owned.count) partial[(o + j / 4) * C + c + j % 4] = sums[i];
    }
  }
}

// Shared memory: dy [O, e_rows, OW], then of this block's channels e [e_rows, e_pitch], x [x_rows, x_pitch],
// the depthwise outputs [pixels] and the pointwise weights [O, kChannels].
// Grid: (tiles of all pictures, blocks of channels, jobs).
template <int K, int S, int D>
__global__ void __launch_bounds__(kThreads, 2) bwd_kernel(const __grid_constant__ Launch<GradJob> launch) {
  using Conv = Conv<K, S, D>;
  const Shape& shape = launch.shape;
  const GradJob& job = launch.jobs[blockIdx.z];
  const Conv conv{shape, launch.rows};
  const int C = shape.C, O = shape.O, first_channel = blockIdx.y * kChannels;
  const int dy_pitch = conv.e_rows() * shape.OW;
  extern __shared__ __align__(16) float shared[];
  float* dy_tile = shared;
  float* e = dy_tile + O * dy_pitch;
  float* tile = e + kChannels * conv.e_rows() * conv.e_pitch();
  float* depthwise = tile + kChannels * conv.x_rows() * conv.x_pitch();
  float* weight = depthwise + kChannels * conv.pixels();

  load_dy(conv, dy_tile, job);
  load_matrix(weight, kChannels, input(job.pointwise) + first_channel, C, O, kChannels);
  const int64_t planes = (int64_t(conv.picture()) * C + first_channel) * shape.H * shape.W;
  load_x(conv, tile, input(job.x) + planes, kChannels, conv.first_row() * S - Conv::kPad);
  zero_border(conv, e);
  const int c = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float w[K * K];
  load_weights<K>(w, input(job.depthwise) + (first_channel + c) * K * K);
  __syncthreads();

  compute_e(conv, e, dy_tile, weight);
  __syncthreads();

  const float* own_e = e + c * conv.e_rows() * conv.e_pitch();
  const float* own_x = tile + c * conv.x_rows() * conv.x_pitch();
  if (job.depthwise_partial != 0 || job.pointwise_partial != 0) {
    float grad[K * K] = {};
    recompute_depthwise(conv, depthwise + c * conv.pixels(), grad, own_x, own_e, w, lane);
    if (job.depthwise_partial != 0) {
      Range owned{0, K * K};
      reduce_scatter<K * K>(grad, kLanes / 2, owned);
      float* partial = output(job.depthwise_partial) + (int64_t(blockIdx.x) * C + first_channel + c) * K * K;
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // 16 lanes own at most two of 25
        if (i < owned.count) partial[owned.first + i] = grad[i];
      }
    }
  }
  if (job.dx != 0) {
    const int64_t offset = (int64_t(c) * shape.H + conv.first_row() * S) * shape.W;
    gather_dx(conv, output(job.dx) + planes + offset, own_x, own_e, w, lane);
  }
  if (job.pointwise_partial == 0) return;
  __syncthreads();
  pointwise_gradient(output(job.pointwise_partial) + int64_t(blockIdx.x) * O * C + first_channel,
                     dy_tile + Conv::kHalo * shape.OW, dy_pitch, depthwise, conv.pixels(), O, C);
}

// Adds up the tiles' weight gradients in a fixed order; a size of 0 leaves that gradient out.
// Grid: (blocks of weights, jobs).
__global__ void __launch_bounds__(kReduceColumns * kReduceSplits)
    bwd_reduce_kernel(const __grid_constant__ Launch<GradJob> launch, int pointwise_size, int depthwise_size,
                      int tiles) {
  __shared__ float sums[kReduceSplits][kReduceColumns];
  const GradJob& job = launch.jobs[blockIdx.y];
  int i = blockIdx.x * kReduceColumns + threadIdx.x;
  const bool pointwise = i < pointwise_size;
  if (!pointwise) i -= pointwise_size;
  const int size = pointwise ? pointwise_size : depthwise_size;
  const float* partial = input(pointwise ? job.pointwise_partial : job.depthwise_partial);
  float sum = 0.f;
  if (i < size) {
#pragma unroll 8
    for (int tile = threadIdx.y; tile < tiles; tile += kReduceSplits) sum += partial[int64_t(tile) * size + i];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= size) return;
  for (int split = 1; split < kReduceSplits; ++split) sum += sums[split][threadIdx.x];
  output(pointwise ? job.pointwise_grad : job.depthwise_grad)[i] = sum;
}

template <typename Job>
Launch<Job> parameters_of(const Shape& shape, const std::vector<Job>& jobs, int rows) {
  if (jobs.size() > kMaxJobs) throw std::invalid_argument("too many convolutions in one launch");
  Launch<Job> parameters{shape, rows, {}};
  std::copy(jobs.begin(), jobs.end(), parameters.jobs);
  return parameters;
}

template <int K, int S, int D>
struct Variant {
  static constexpr auto* kForward = &fwd_kernel<K, S, D>;
  static constexpr auto* kBackward = &bwd_kernel<K, S, D>;
};

// Calls f with the Variant of the shape's kernel size, stride and dilation.
template <typename F>
void specialise(const Shape& shape, F f) {
  const bool wide = shape.K == 5;
  switch (shape.stride * 2 + shape.dilation) {
    case 3: return wide ? f(Variant<5, 1, 1>()) : f(Variant<3, 1, 1>());
    case 4: return wide ? f(Variant<5, 1, 2>()) : f(Variant<3, 1, 2>());
    case 5: return wide ? f(Variant<5, 2, 1>()) : f(Variant<3, 2, 1>());
    default: return wide ? f(Variant<5, 2, 2>()) : f(Variant<3, 2, 2>());
  }
}

}  // namespace

void forward(const Shape& shape, const std::vector<Job>& jobs, int rows, int shared_bytes, Address stream) {
  const Launch<Job> parameters = parameters_of(shape, jobs, rows);
  specialise(shape, [&](auto variant) {
    launch(variant.kForward, dim3(shape.batch * (shape.OH / rows), jobs.size()), kThreads, shared_bytes, stream,
           parameters);
  });
}

void backward(const Shape& shape, const std::vector<GradJob>& jobs, int rows, int shared_bytes, Address stream) {
  const Launch<GradJob> parameters = parameters_of(shape, jobs, rows);
  const int tiles = shape.batch * (shape.OH / rows);
  specialise(shape, [&](auto variant) {
    launch(variant.kBackward, dim3(tiles, shape.C / kChannels, jobs.size()), kThreads, shared_bytes, stream,
           parameters);
  });
  const int pointwise_size = jobs[0].pointwise_grad ? shape.O * shape.C : 0;
  const int depthwise_size = jobs[0].depthwise_grad ? shape.C * shape.K * shape.K : 0;
  const int blocks = ceil_div(pointwise_size + depthwise_size, kReduceColumns);
  if (blocks == 0) return;
  bwd_reduce_kernel<<<dim3(blocks, jobs.size()), dim3(kReduceColumns, kReduceSplits), 0,
                      reinterpret_cast<cudaStream_t>(stream)>>>(parameters, pointwise_size, depthwise_size, tiles);
  check(cudaGetLastError());
}

}  // namespace sepconv
