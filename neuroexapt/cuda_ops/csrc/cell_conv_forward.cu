// The forward convolution stages of a fused cell; cell_conv.h has the legend.
//
// What limits these kernels is traffic inside a multiprocessor, so depthwise outputs go from the registers that
// they are summed in straight to the tensor cores: a lane computes them for the channels and pixels that it must
// hold as the right operand of the matrix product. For that, shared memory keeps the tile's channels in the
// order in which lanes own them (contraction_slot). Convolutions of one kernel size and dilation that read the
// same tensor form a group: its tile is loaded once, and at 16 channels two of them share every window.

#include "cell_conv_common.cuh"
#include "drawn.cuh"

namespace cell_conv {
namespace {

constexpr int kForwardThreads = 128;
constexpr int kMaxGroups = 20;  // of a launch

struct Conv {
  const float *depthwise, *pointwise;
  Address z;
  float* moments;
  Address mixing;
};

struct Group {
  Address x;
  int64_t x_batch_stride;
  Address stats;
  int kernel_size, dilation, count;
  Conv convs[4];
};

struct ForwardLaunch {
  Shape shape;
  Group groups[kMaxGroups];
};

template <int C>
struct Unit {  // what a warp computes at a time: eight strips of kStrip pixels, all channels
  static constexpr int kStrip = C == 64 ? 4 : 8;
  static constexpr int kRuns = kStrip;  // runs of eight pixels
  static constexpr int kCount = Tile<C>::kRuns / kRuns;
  static constexpr int kStripsPerRow = Tile<C>::kWidth / kStrip;
  // Convolutions that may share a tile: more would spare loads, but their weights take room from other blocks.
  static constexpr int kGroupSize = C == 16 ? 4 : 2;

  // The strip whose sums lane q of four holds at index i. Neighbouring lanes own neighbouring runs.
  static __device__ int strip(int q, int i) {
    return kStrip == 8 ? 2 * i + (q & 1) + 4 * (q >> 1) : 2 * q + i;
  }
};

template <int C>
struct Geometry {
  static constexpr int kPitch = C == 32 ? 28 : Tile<C>::kWidth + 2 * kHalo;
  int plane;

  __host__ __device__ Geometry(const Shape& shape, int pad) : plane(plane_of(stored_rows<C>(shape, pad))) {}

  // Chosen, as the pitch, so that a warp's 16-byte loads of windows meet no bank twice.
  __host__ __device__ static constexpr int plane_of(int rows) {
    return pad_to_bank(rows * kPitch, C == 16 ? 4 : C == 32 ? 8 : 24);
  }
};

template <int C>
struct Sums {  // of a unit and one convolution
  float values[C / 16][Unit<C>::kStrip][4] = {};
};

// Where a lane's strip begins in a plane of shared memory, and its row of the picture.
struct Strip {
  int column, y;
};

// depthwise += W_dw ⋆ tile of this lane's strip: channels `slot` and `slot` + 4, for N convolutions.
template <int C, typename Kind, int N>
__device__ void convolve_rows(float (&depthwise)[2][N][Unit<C>::kStrip], const float* tile, const float* taps,
                              int slot, Strip strip, const Place<C>& at, const Geometry<C>& geometry) {
  constexpr int kStrip = Unit<C>::kStrip, kDilation = Kind::kDilation, kPad = Kind::kPad;
  const float* column = tile + slot * geometry.plane + strip.column;
  // Not unrolled: the instruction cache would not hold the loop.
#pragma unroll 1
  for (int ky = 0; ky < Kind::kSize; ++ky) {
    const float* row = column + at.stored(strip.y + ky * kDilation - kPad) * Geometry<C>::kPitch;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float window[kStrip + 2 * kHalo];
      load_window<kPad, kStrip>(window, row + half * 4 * geometry.plane);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float w[Kind::kSize];
        load_tap_row<Kind::kSize>(w, taps + (n * C + slot + half * 4) * kTapsPitch, ky);
#pragma unroll
        for (int kx = 0; kx < Kind::kSize; ++kx) {
#pragma unroll
          for (int t = 0; t < kStrip; ++t) {
            depthwise[half][n][t] = fmaf(w[kx], window[kHalo + t + kx * kDilation - kPad], depthwise[half][n][t]);
          }
        }
      }
    }
  }
}

// What a warp does of a unit: all of it, or one of kShares shares, with as many input channels each. The sums of the
// output channels from the share's own on come first: those that it will store.
struct Share {
  int number, count;

  template <int C>
  __device__ int first_channel() const {
    return number * (C / count);
  }
};

// sums = W_pw · (W_dw ⋆ tile) of a unit for N convolutions of a group, over the share's input channels.
template <int C, int N, bool kExact>
__device__ void convolve(Sums<C> (&sums)[N], const float* tile, const float* taps, const Group& group, int first,
                         int unit, Share share, const Place<C>& at, const Geometry<C>& geometry) {
  constexpr int kStrip = Unit<C>::kStrip;
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4;
  const int number = unit * 8 + Unit<C>::strip(g / 2, g % 2);
  const Strip strip{number % Unit<C>::kStripsPerRow * kStrip, at.y0 + number / Unit<C>::kStripsPerRow};
#pragma unroll 1
  for (int i = 0; i < C / 8 / share.count; ++i) {
    const int step = share.first_channel<C>() / 8 + i;  // channels 16 · (step / 2) + 4q + 2 · (step % 2) + {0, 1}
    float2 weights[N][C / 16][2];  // asked for long before they are needed
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float* at_step = group.convs[first + n].pointwise + step / 2 * 16 + 4 * q + step % 2 * 2;
#pragma unroll
      for (int m = 0; m < C / 16; ++m) {
        const float* row = at_step + ((m * 16 + share.first_channel<C>()) % C + g) * C;
        weights[n][m][0] = __ldg(reinterpret_cast<const float2*>(row));
        weights[n][m][1] = __ldg(reinterpret_cast<const float2*>(row + 8 * C));
      }
    }
    float depthwise[2][N][kStrip] = {};
    const int slot = step / 2 * 16 + step % 2 * 8 + q;
    with_kind(group.kernel_size, group.dilation, [&](auto kind) {
      convolve_rows<C, decltype(kind), N>(depthwise, tile, taps, slot, strip, at, geometry);
    });
#pragma unroll
    for (int n = 0; n < N; ++n) {
      multiply_strip<kExact>(sums[n].values, weights[n], depthwise[0][n], depthwise[1][n]);
    }
  }
}

// Adds up the sums of the two warps that share a unit, each those that it will store. `shared` has room for the other
// half of every warp's sums.
template <int C>
__device__ void swap_halves(Sums<C>& sums, float4* shared, int partner) {
  constexpr int kHalf = C / 32, kStrip = Unit<C>::kStrip;
  const auto place = [&](int warp, int m, int t) -> float4& {
    return shared[((warp * kHalf + m) * kStrip + t) * 32 + threadIdx.x % 32];
  };
#pragma unroll
  for (int m = 0; m < kHalf; ++m) {
#pragma unroll
    for (int t = 0; t < kStrip; ++t) {
      const float(&v)[4] = sums.values[kHalf + m][t];
      place(threadIdx.x / 32, m, t) = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kHalf; ++m) {
#pragma unroll
    for (int t = 0; t < kStrip; ++t) {
      const float4 v = place(partner, m, t);
      float(&own)[4] = sums.values[m][t];
      own[0] += v.x, own[1] += v.y, own[2] += v.z, own[3] += v.w;
    }
  }
}

// The picture's row and column of the first pixel of a run of eight.
struct Run {
  int y, x;

  template <int C>
  static __device__ Run of(int run, const Place<C>& at) {
    return {at.y0 + run / Tile<C>::kRunsPerRow, at.x0 + run % Tile<C>::kRunsPerRow * 8};
  }
  __device__ int pixels(const Shape& shape) const {  // inside the picture
    return y < shape.height ? min(max(shape.width - x, 0), 8) : 0;
  }
};

// Stores this lane's run, and that of the neighbouring lane q ^ 1. The two swap halves first: so that each
// store instruction covers whole 32-byte sectors.
template <int C, bool kFull>
__device__ void store_run(float* plane, const float (&v)[8], int run, const Place<C>& at, const Shape& shape,
                          bool aligned) {
  const bool odd = threadIdx.x & 1;
  float received[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) received[t] = __shfl_xor_sync(~0u, odd ? v[t] : v[4 + t], 1);
  const int half = odd ? 4 : 0, width = shape.width;
  const float4 first = odd ? make_float4(received[0], received[1], received[2], received[3])
                           : make_float4(v[0], v[1], v[2], v[3]);
  const float4 second = odd ? make_float4(v[4], v[5], v[6], v[7])
                            : make_float4(received[0], received[1], received[2], received[3]);
  const auto store = [&](const Run& to, float4 values) {
    float* row = plane + to.y * width;
    if constexpr (kFull) store4(row + to.x + half, values);
    else if (to.y < shape.height) store_row4(row, to.x + half, width, aligned, values);
  };
  store(Run::of(run & ~1, at), first);
  store(Run::of(run | 1, at), second);
}

// Stores this lane's run, half of such a sector, whose other half a neighbouring lane stores.
template <int C, bool kFull>
__device__ void store_run(storage::bf16* plane, const float (&v)[8], int run, const Place<C>& at, const Shape& shape,
                          bool aligned) {
  const Run to = Run::of(run, at);
  storage::bf16* row = plane + to.y * shape.width;
  if constexpr (kFull) {
    storage::store8(row + to.x, v);
  } else if (to.y < shape.height) {
    store_row4(row, to.x, shape.width, aligned, make_float4(v[0], v[1], v[2], v[3]));
    store_row4(row, to.x + 4, shape.width, aligned, make_float4(v[4], v[5], v[6], v[7]));
  }
}

// Stores a unit's sums of one convolution, and their moments a channel into shared memory [unit][C]: of M · 16
// channels. kFull: all pixels of the unit lie inside the picture, and its rows are aligned.
template <int C, int M, bool kFull, typename T>
__device__ void store_unit(const Sums<C>& sums, T* z, float2* moments, float* count, int unit,
                           int first_channel, const Place<C>& at, const Shape& shape) {
  constexpr int kStrip = Unit<C>::kStrip, kLaneRuns = kStrip / 4;
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4, plane = shape.height * shape.width;
  const bool aligned = shape.width % 4 == 0;
  asm volatile("" : "+r"(unit));  // else the addresses are computed, and spilled, ahead of the convolution
  int runs[kLaneRuns], pixels[kLaneRuns], total = 0;
#pragma unroll
  for (int i = 0; i < kLaneRuns; ++i) {
    runs[i] = unit * Unit<C>::kRuns + (kStrip == 8 ? Unit<C>::strip(q, i) : q);
    pixels[i] = kFull ? 8 : Run::of(runs[i], at).pixels(shape);
    total += pixels[i];
  }
  const float unit_count = sum_over_quad(float(total)), scale = 1.f / fmaxf(unit_count, 1.f);
  if (lane == 0) count[unit] = unit_count;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = first_channel + m * 16 + h * 8 + g;
      float v[kLaneRuns][8], sum = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < kLaneRuns; ++i) {
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          v[i][t] = kStrip == 8 ? sums.values[m][t][2 * h + i] : sums.values[m][t % 4][2 * h + t / 4];
          if (kFull || t < pixels[i]) sum += v[i][t];
        }
        store_run<C, kFull>(z + channel * plane, v[i], runs[i], at, shape, aligned);
      }
      const float mean = sum_over_quad(sum) * scale;
#pragma unroll
      for (int i = 0; i < kLaneRuns; ++i) {
#pragma unroll
        for (int t = 0; t < 8; ++t) {
          if (kFull || t < pixels[i]) squares = fmaf(v[i][t] - mean, v[i][t] - mean, squares);
        }
      }
      squares = sum_over_quad(squares);
      if (q == 0) moments[unit * C + channel] = make_float2(mean, squares);
    }
  }
}

// The rare case, out of the way of the instruction cache.
template <int C, int M, typename T>
__noinline__ __device__ void store_unit_at_border(Sums<C> sums, T* z, float2* moments, float* count, int unit,
                                                  int first_channel, const Place<C>& at, const Shape& shape) {
  store_unit<C, M, false>(sums, z, moments, count, unit, first_channel, at, shape);
}

// The tile's moments from those of its units, merged as Chan, Golub and LeVeque do.
template <int C>
__device__ void store_moments(float* target, const float2* moments, const float* count) {
  for (int channel = threadIdx.x; channel < C; channel += kForwardThreads) {
    float total = 0.f, mean = 0.f, squares = 0.f;
    for (int unit = 0; unit < Unit<C>::kCount; ++unit) {
      total += count[unit];
      mean = fmaf(count[unit], moments[unit * C + channel].x, mean);
    }
    mean /= fmaxf(total, 1.f);
    for (int unit = 0; unit < Unit<C>::kCount; ++unit) {
      const float2 m = moments[unit * C + channel];
      squares += m.y + count[unit] * (m.x - mean) * (m.x - mean);
    }
    target += 3 * channel;
    target[0] = total, target[1] = mean, target[2] = squares;
    target -= 3 * channel;
  }
}

template <int C, int kGroupSize>
int forward_shared_floats(const Shape& shape, int pad) {
  return C * Geometry<C>(shape, pad).plane + kGroupSize * (C * kTapsPitch + Unit<C>::kCount * (2 * C + 1));
}

// How many blocks a multiprocessor shall hold: what leaves the compiler enough registers.
template <int C, int kGroupSize>
constexpr int blocks_at_a_time() {
  if (C == 16) return kGroupSize == 1 ? 5 : 3;
  return C == 32 ? 3 : 4;
}

// Grid: (parts, groups).
template <int C, int kGroupSize, typename T, bool kExact>
__global__ void __launch_bounds__(kForwardThreads, (blocks_at_a_time<C, kGroupSize>()))
    forward_kernel(const __grid_constant__ ForwardLaunch launch) {
  launching::let_next_begin();
  extern __shared__ __align__(16) float shared[];
  const Shape& shape = launch.shape;
  const Group& group = launch.groups[blockIdx.y];
  if (kGroupSize == 1 && !drawn::runs(group.convs[0].mixing)) return;
  const int pad = group.dilation * (group.kernel_size / 2);
  const Place<C> at(shape, pad);
  const Geometry<C> geometry(shape, pad);
  float* tile = shared;
  float* taps = tile + C * geometry.plane;
  float2* moments = reinterpret_cast<float2*>(taps + kGroupSize * C * kTapsPitch);
  float* count = reinterpret_cast<float*>(moments + kGroupSize * Unit<C>::kCount * C);

  for (int n = 0; n < group.count; ++n) {
    copy_taps<C, kForwardThreads>(taps + n * C * kTapsPitch, group.convs[n].depthwise, group.kernel_size,
                                  contraction_slot);
  }
  const Source<T> source(group.x, group.x_batch_stride, group.stats, shape, at.picture);
  load_tile<C, kForwardThreads>(tile, source, at, shape, Geometry<C>::kPitch, geometry.plane,
                                contraction_slot);
  wait_for_copies();
  __syncthreads();

  const int64_t picture = int64_t(at.picture) * C * shape.height * shape.width;
  const bool full = at.y0 + Tile<C>::kRows <= shape.height && at.x0 + Tile<C>::kWidth <= shape.width &&
                    shape.width % (16 / sizeof(T)) == 0;
  constexpr int kWarps = kForwardThreads / 32, kUnits = Unit<C>::kCount;
  const int warp = threadIdx.x / 32;
  const auto store = [&](const Sums<C>& sums, int n, int unit, auto row_blocks, int first_channel) {
    constexpr int M = decltype(row_blocks)::value;
    T* z = reinterpret_cast<T*>(group.convs[n].z) + picture;
    float2* unit_moments = moments + n * kUnits * C;
    float* unit_count = count + n * kUnits;
    if (full) store_unit<C, M, true>(sums, z, unit_moments, unit_count, unit, first_channel, at, shape);
    else store_unit_at_border<C, M>(sums, z, unit_moments, unit_count, unit, first_channel, at, shape);
  };
  const auto run = [&](auto& sums, int first, int unit) {
    constexpr int N = sizeof(sums) / sizeof(sums[0]);
    convolve<C, N, kExact>(sums, tile, taps + first * C * kTapsPitch, group, first, unit, {0, 1}, at, geometry);
#pragma unroll
    for (int n = 0; n < N; ++n) store(sums[n], first + n, unit, std::integral_constant<int, C / 16>(), 0);
  };
  if constexpr (kGroupSize * kUnits * 2 == kWarps) {
    static_assert(kWarps * (C / 32) * Unit<C>::kStrip * 32 * 4 <= C * (Geometry<C>::plane_of(2) + kTapsPitch),
                  "half of the sums fit where a tile of two rows, the least that there is, and the taps were");
    const Share share{warp / kUnits, 2};
    const int unit = warp % kUnits;
    Sums<C> sums[1];
    convolve<C, 1, kExact>(sums, tile, taps, group, 0, unit, share, at, geometry);
    __syncthreads();  // nobody reads the tile and the taps any more
    swap_halves<C>(sums[0], reinterpret_cast<float4*>(shared), warp ^ kUnits);
    store(sums[0], 0, unit, std::integral_constant<int, C / 32>(), share.first_channel<C>());
  } else {
    int single = 0;  // the first convolution that is not one of a pair
    if constexpr (C == 16 && kGroupSize > 1) {
      single = group.count & ~1;
      for (int task = warp; task < single / 2 * kUnits; task += kWarps) {
        Sums<C> sums[2];
        run(sums, task / kUnits * 2, task % kUnits);
      }
    }
    for (int task = single * kUnits + warp; task < group.count * kUnits; task += kWarps) {
      Sums<C> sums[1];
      run(sums, task / kUnits, task % kUnits);
    }
  }
  __syncthreads();
  for (int n = 0; n < group.count; ++n) {
    store_moments<C>(group.convs[n].moments + int64_t(blockIdx.x) * C * 3, moments + n * Unit<C>::kCount * C,
                     count + n * Unit<C>::kCount);
  }
}

bool share_tile(const Group& group, const Job& job, int size) {
  return group.count < size && group.x == job.x && group.stats == job.stats &&
         group.kernel_size == job.kernel_size && group.dilation == job.dilation;
}

int largest_pad(const std::vector<Group>& groups) {
  int pad = 0;
  for (const Group& group : groups) pad = std::max(pad, group.kernel_size / 2 * group.dilation);
  return pad;
}

std::vector<Group> group_jobs(std::vector<Job> jobs, int size) {
  // The long ones first, so that none is left for the end; stable, so that launches are reproducible.
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) {
    return a.kernel_size * 4 + a.dilation > b.kernel_size * 4 + b.dilation;
  });
  std::vector<Group> groups;
  for (const Job& job : jobs) {
    if (job.mixing != 0) size = 1;  // of one kind few are drawn
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const Group& candidate) { return share_tile(candidate, job, size); });
    if (group == groups.end()) {
      groups.push_back({job.x, job.x_batch_stride, job.stats, job.kernel_size, job.dilation, 0, {}});
      group = groups.end() - 1;
    }
    group->convs[group->count++] = {
        reinterpret_cast<const float*>(job.depthwise), reinterpret_cast<const float*>(job.pointwise), job.z,
        reinterpret_cast<float*>(job.moments), job.mixing};
  }
  return groups;
}

}  // namespace

int forward_parts(const Shape& shape) {
  return with_channels(shape, [&](auto channels) { return tile_count<channels()>(shape); });
}

void forward(const Shape& shape, const std::vector<Job>& jobs, Address stream) {
  const int size = with_channels(shape, [](auto channels) { return Unit<channels()>::kGroupSize; });
  const std::vector<Group> groups = group_jobs(jobs, size);
  const bool share = std::any_of(groups.begin(), groups.end(), [](const Group& group) { return group.count > 1; });
  for (size_t first = 0; first < groups.size(); first += kMaxGroups) {
    const size_t count = std::min(groups.size() - first, size_t(kMaxGroups));
    ForwardLaunch parameters{shape, {}};
    std::copy_n(groups.begin() + first, count, parameters.groups);
    with_channels(shape, [&](auto channels) {
      storage::with_precision(shape.bf16, shape.exact, [&](auto type, auto exact) {
        using T = typename decltype(type)::type;
        constexpr int C = channels();
        const auto run = [&](auto group_size) {
          constexpr int kGroupSize = group_size();
          launch(forward_kernel<C, kGroupSize, T, exact()>, dim3(tile_count<C>(shape), count), kForwardThreads,
                 forward_shared_floats<C, kGroupSize>(shape, largest_pad(groups)) * sizeof(float), stream, parameters);
        };
        if (share) run(std::integral_constant<int, Unit<C>::kGroupSize>());
        else run(std::integral_constant<int, 1>());
      });
    });
  }
}

}  // namespace cell_conv
