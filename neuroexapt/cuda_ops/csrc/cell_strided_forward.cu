// The forward convolution stage of a reduction cell; cell_strided.h has the legend.
//
// As in cell_conv_forward.cu a lane computes the depthwise outputs that it must hold as right operand of the matrix
// product, and convolutions of one kernel size and dilation share a tile, and windows where the registers suffice.
// At dilation 2 every pixel that is read has an even row and an even column, so such a tile holds no others: it is
// a quarter as large, and its convolution one of stride and dilation 1.

#include "cell_strided_common.cuh"
#include "drawn.cuh"

namespace cell_strided {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 4;        // output rows of a tile
constexpr int kGroupSize = 4;   // convolutions that share a tile
constexpr int kMaxGroups = 16;  // of a launch
constexpr int kBatch = 8;       // loads in flight: nothing else hides their latency

struct Conv {
  const float *depthwise, *pointwise;
  Address z;
  float* moments;
  Address mixing;  // of the only one of its group, or 0
};

struct Group {
  Address x;
  int64_t x_batch_stride;
  int kernel_size, dilation, count;
  Conv convs[kGroupSize];
};

struct Launch {
  Shape shape;
  Group groups[kMaxGroups];
};

// Where a block's tile lies among the output pixels.
template <int C>
struct Place {
  int out_height, out_width, picture, y0, x0;

  __device__ explicit Place(const Shape& shape) : out_height((shape.height + 1) / 2), out_width(shape.width / 2) {
    const int across = ceil_div(out_width, kWidth<C>), down = ceil_div(out_height, kRows);
    picture = blockIdx.x / (across * down);
    const int tile = blockIdx.x % (across * down);
    y0 = tile / across * kRows;
    x0 = tile % across * kWidth<C>;
  }

  // A strip counted row by row, and whether it lies inside the picture.
  __device__ int y(int strip) const { return y0 + strip / kStripsPerRow<C>; }
  __device__ int x(int strip) const { return x0 + strip % kStripsPerRow<C> * kStrip; }
  __device__ bool contains(int strip) const { return y(strip) < out_height && x(strip) < out_width; }
};

// The tile in shared memory: from two columns (of those kept) left of its windows' centers on.
template <int C, int K, int D>
struct Tile {
  static constexpr int kScale = D == 1 ? 2 : 1;  // kept rows and columns from one output pixel to the next
  static constexpr int kStoredRows = (kRows - 1) * kScale + K;
  static constexpr int kPitch = kWidth<C> * kScale + 4;
  static constexpr int kPlane = pad_to_bank(kStoredRows * kPitch, 4);
  static constexpr int kWindow = 4 * kScale + 4;
  static constexpr int kQuads = kWidth<C> / 2 + 2;  // of the picture, a row

  // Eight channels 8n + 2q + i are contracted together, by the lanes q of four. The place of the bit i in their slot
  // is such that lanes that load windows together meet no bank twice: two strips of four channels.
  static constexpr int kHalfBit = (C == 64 ? 1 : 0) + (D == 1 ? 1 : 0);
  static __device__ int slot(int channel) {
    const int q = channel % 8 / 2, half = channel % 2, below = q & ((1 << kHalfBit) - 1);
    return channel / 8 * 8 + (below | half << kHalfBit | (q - below) << 1);
  }
};

template <int C>
constexpr int kConvsAtOnce = C == 64 ? 1 : 2;  // of a warp, whose windows are loaded once

template <int C>
constexpr int kUnits = kRows * kStripsPerRow<C> / 8;  // of eight strips, which a warp computes at a time

// Steps through the rows of all channels, kStep at a time, without division.
template <int kRowsOfChannel, int kStep>
struct RowWalk {
  int channel, row;

  __device__ explicit RowWalk(int first) : channel(first / kRowsOfChannel), row(first % kRowsOfChannel) {}

  __device__ void next() {
    channel += kStep / kRowsOfChannel;
    row += kStep % kRowsOfChannel;
    if (row >= kRowsOfChannel) row -= kRowsOfChannel, ++channel;
  }
};

template <int C, int K, int D, typename T>
__device__ void load_tile(float* tile, const T* x, const Shape& shape, const Place<C>& at) {
  using Tile = Tile<C, K, D>;
  constexpr int kRowsAtOnce = kThreads / Tile::kQuads;
  const int quad = threadIdx.x % Tile::kQuads, first = threadIdx.x / Tile::kQuads;
  if (first >= kRowsAtOnce) return;
  const int top = 2 * at.y0 - K / 2 * D, column = 2 * at.x0 - 4 + 4 * quad;
  const bool inside = unsigned(column) < unsigned(shape.width);
  RowWalk<Tile::kStoredRows, kRowsAtOnce> walk(first);
#pragma unroll 1
  while (walk.channel < C) {
    float4 v[kBatch];
    auto ahead = walk;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, ahead.next()) {
      const int y = top + ahead.row * D;
      v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (ahead.channel < C && inside && unsigned(y) < unsigned(shape.height)) {
        v[i] = load4(x + (ahead.channel * shape.height + y) * shape.width + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i, walk.next()) {
      if (walk.channel >= C) break;
      const float4 a = relu4(v[i]);
      float* target = tile + Tile::slot(walk.channel) * Tile::kPlane + walk.row * Tile::kPitch;
      if constexpr (D == 1) {
        if (quad > 0) *reinterpret_cast<float2*>(target + 4 * quad - 2) = make_float2(a.x, a.y);
        if (quad < Tile::kQuads - 1) *reinterpret_cast<float2*>(target + 4 * quad) = make_float2(a.z, a.w);
      } else {
        *reinterpret_cast<float2*>(target + 2 * quad) = make_float2(a.x, a.z);
      }
    }
  }
}

template <int C>
using Sums = float[kConvsAtOnce<C>][C / 16][kStrip][4];

// sums = W_pw · (W_dw ⋆ tile) of a unit for kConvsAtOnce convolutions. Where the group has fewer, the last one's pointwise
// weights and whatever taps are there give sums that nobody stores.
template <int C, int K, int D, bool kExact>
__device__ void convolve(Sums<C>& sums, const float* tile, const float* taps, const Group& group, int first,
                         int unit) {
  using Tile = Tile<C, K, D>;
  constexpr int N = kConvsAtOnce<C>;
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4, strip = unit * 8 + place_of_column(g);
  const float* corner = tile + strip / kStripsPerRow<C> * Tile::kScale * Tile::kPitch +
                        strip % kStripsPerRow<C> * kStrip * Tile::kScale;
#pragma unroll 1
  for (int step = 0; step < C / 8; ++step) {
    const int channel = 8 * step + 2 * q;
    float2 weights[N][C / 16][2];  // asked for long before they are needed
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float* row = group.convs[min(first + n, group.count - 1)].pointwise + g * C + channel;
#pragma unroll
      for (int m = 0; m < C / 16; ++m) {
        weights[n][m][0] = __ldg(reinterpret_cast<const float2*>(row + m * 16 * C));
        weights[n][m][1] = __ldg(reinterpret_cast<const float2*>(row + (m * 16 + 8) * C));
      }
    }
    float depthwise[2][N][kStrip] = {};
    // Not unrolled: the instruction cache would not hold the loop.
#pragma unroll 1
    for (int ky = 0; ky < K; ++ky) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float window[Tile::kWindow];
        load_window(window, corner + Tile::slot(channel + half) * Tile::kPlane + ky * Tile::kPitch);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          float w[K];
          load_tap_row<K>(w, taps + ((first + n) * C + channel + half) * kTapsPitch, ky);
#pragma unroll
          for (int kx = 0; kx < K; ++kx) {
#pragma unroll
            for (int t = 0; t < kStrip; ++t) {
              depthwise[half][n][t] = fmaf(w[kx], window[t * Tile::kScale + kx - K / 2 + 2], depthwise[half][n][t]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      multiply_strip<kExact>(sums[n], weights[n], depthwise[0][n], depthwise[1][n]);
    }
  }
}

// Stores a unit's sums of one convolution, and their {mean, sum of squared deviations} a channel into `moments`.
template <int C, typename T>
__device__ void store_unit(const float (&sums)[C / 16][kStrip][4], T* z, float2* moments, float* count,
                           int unit, const Place<C>& at) {
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4, plane = at.out_height * at.out_width;
  int offsets[2];
  bool exists[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int strip = unit * 8 + place_of_column(2 * q + e);
    exists[e] = at.contains(strip);
    offsets[e] = at.y(strip) * at.out_width + at.x(strip);
  }
  const float total = sum_over_quad(float(kStrip * (exists[0] + exists[1]))), scale = 1.f / fmaxf(total, 1.f);
  if (lane == 0) *count = total;
#pragma unroll
  for (int m = 0; m < C / 16; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = m * 16 + h * 8 + g;
      float sum = 0.f, squares = 0.f;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = 2 * h + e;
        const float4 v = make_float4(sums[m][0][r], sums[m][1][r], sums[m][2][r], sums[m][3][r]);
        store4_if(exists[e], z + channel * plane + offsets[e], v);
        sum += exists[e] ? (v.x + v.y) + (v.z + v.w) : 0.f;
      }
      const float mean = sum_over_quad(sum) * scale;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float own = 0.f;
#pragma unroll
        for (int t = 0; t < kStrip; ++t) {
          const float deviation = sums[m][t][2 * h + e] - mean;
          own = fmaf(deviation, deviation, own);
        }
        squares += exists[e] ? own : 0.f;
      }
      squares = sum_over_quad(squares);
      if (q == 0) moments[channel] = make_float2(mean, squares);
    }
  }
}

// The tile's moments from those of its units, merged as Chan, Golub and LeVeque do.
template <int C>
__device__ void store_moments(float* target, const float2* moments, const float* count) {
  float total = 0.f, mean = 0.f, squares = 0.f;
#pragma unroll
  for (int unit = 0; unit < kUnits<C>; ++unit) {
    total += count[unit];
    mean = fmaf(count[unit], moments[unit * C].x, mean);
  }
  mean /= fmaxf(total, 1.f);
#pragma unroll
  for (int unit = 0; unit < kUnits<C>; ++unit) {
    const float2 m = moments[unit * C];
    squares += m.y + count[unit] * (m.x - mean) * (m.x - mean);
  }
  target[0] = total, target[1] = mean, target[2] = squares;
}

// Shared memory: taps [convolutions][C][kTapsPitch], float2 moments [convolutions][units][C], counts
// [convolutions][units], and the tile, which needs most for a 5 x 5 of dilation 1.
template <int C>
struct Shared {
  static constexpr int kTaps = 0;
  static constexpr int kMoments = kTaps + kGroupSize * C * kTapsPitch;
  static constexpr int kCounts = kMoments + 2 * kGroupSize * kUnits<C> * C;
  static constexpr int kTile = (kCounts + kGroupSize * kUnits<C> + 3) / 4 * 4;
  static constexpr int kFloats = kTile + C * Tile<C, 5, 1>::kPlane;
};

template <int C, int K, int D, typename T, bool kExact>
__device__ void forward_group(const Launch& launch, const Group& group) {
  extern __shared__ __align__(16) float shared[];
  constexpr int N = kConvsAtOnce<C>;
  const Place<C> at(launch.shape);
  float* taps = shared + Shared<C>::kTaps;
  float2* moments = reinterpret_cast<float2*>(shared + Shared<C>::kMoments);
  float* counts = shared + Shared<C>::kCounts;
  float* tile = shared + Shared<C>::kTile;

#pragma unroll 1
  for (int n = 0; n < group.count; ++n) {
    for (int i = threadIdx.x; i < C * K * K; i += kThreads) {
      taps[(n * C + i / (K * K)) * kTapsPitch + tap_position(i % (K * K), K)] = __ldg(group.convs[n].depthwise + i);
    }
  }
  const T* x = reinterpret_cast<const T*>(group.x) + at.picture * group.x_batch_stride;
  load_tile<C, K, D>(tile, x, launch.shape, at);
  __syncthreads();

  const int64_t picture = int64_t(at.picture) * C * at.out_height * at.out_width;
  for (int task = threadIdx.x / 32; task < ceil_div(group.count, N) * kUnits<C>; task += kWarps) {
    const int first = task / kUnits<C> * N, unit = task % kUnits<C>;
    Sums<C> sums = {};
    convolve<C, K, D, kExact>(sums, tile, taps, group, first, unit);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int i = first + n, place = i * kUnits<C> + unit;
      if (i >= group.count) break;
      T* z = reinterpret_cast<T*>(group.convs[i].z) + picture;
      store_unit<C>(sums[n], z, moments + place * C, counts + place, unit, at);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group.count * C; i += kThreads) {
    const int n = i / C, channel = i % C;
    store_moments<C>(group.convs[n].moments + (int64_t(blockIdx.x) * C + channel) * 3,
                     moments + n * kUnits<C> * C + channel, counts + n * kUnits<C>);
  }
}

// Grid: (parts, groups).
template <int C, typename T, bool kExact>
__global__ void __launch_bounds__(kThreads, 3) forward_kernel(const __grid_constant__ Launch launch) {
  const Group& group = launch.groups[blockIdx.y];
  if (!drawn::runs(group.convs[0].mixing)) return;
  switch (group.kernel_size * 2 + group.dilation) {
    case 7: return forward_group<C, 3, 1, T, kExact>(launch, group);
    case 8: return forward_group<C, 3, 2, T, kExact>(launch, group);
    case 11: return forward_group<C, 5, 1, T, kExact>(launch, group);
    default: return forward_group<C, 5, 2, T, kExact>(launch, group);
  }
}

std::vector<Group> group_jobs(std::vector<Job> jobs) {
  // The long ones first, so that none is left for the end; stable, so that launches are reproducible.
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) {
    return a.kernel_size * 4 - a.dilation > b.kernel_size * 4 - b.dilation;
  });
  std::vector<Group> groups;
  for (const Job& job : jobs) {
    const int size = job.mixing == 0 ? kGroupSize : 1;  // of one kind few are drawn
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& candidate) {
      return candidate.count < size && candidate.x == job.x && candidate.kernel_size == job.kernel_size &&
             candidate.dilation == job.dilation;
    });
    if (group == groups.end()) {
      group = groups.insert(group, {job.x, job.x_batch_stride, job.kernel_size, job.dilation, 0, {}});
    }
    group->convs[group->count++] = {
        reinterpret_cast<const float*>(job.depthwise), reinterpret_cast<const float*>(job.pointwise), job.z,
        reinterpret_cast<float*>(job.moments), job.mixing};
  }
  return groups;
}

}  // namespace

int forward_parts(const Shape& shape) {
  return specialise(shape, [&](auto channels, auto, auto) {
    return shape.batch * ceil_div((shape.height + 1) / 2, kRows) * ceil_div(shape.width / 2, kWidth<channels()>);
  });
}

void forward(const Shape& shape, const std::vector<Job>& jobs, Address stream) {
  const std::vector<Group> groups = group_jobs(jobs);
  for (size_t first = 0; first < groups.size(); first += kMaxGroups) {
    const size_t count = std::min(groups.size() - first, size_t(kMaxGroups));
    Launch parameters{shape, {}};
    std::copy_n(groups.begin() + first, count, parameters.groups);
    specialise(shape, [&](auto channels, auto type, auto exact) {
      launch(forward_kernel<channels(), typename decltype(type)::type, exact()>,
             dim3(forward_parts(shape), count), kThreads, Shared<channels()>::kFloats * sizeof(float), stream,
             parameters);
    });
  }
}

}  // namespace cell_strided
