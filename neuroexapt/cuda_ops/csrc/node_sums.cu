// The sum of a node and what its gradient starts from; node.h has the legend.

#include "drawn.cuh"
#include "node_windows.cuh"

namespace node {
namespace {

constexpr int kMaxPooled = 16;  // of a launch
constexpr int kInFlight = 8;    // terms whose loads a thread issues before it uses the first

struct SumLaunch {
  Shape shape;
  int count;
  Tensor y;
  Term terms[kMaxTerms];
};

// The numbers of the terms whose weights are not 0, in shared memory.
struct DrawnTerms {
  int numbers[kMaxTerms], count;

  // For all threads of a block.
  __device__ void find(const Term* terms, int of) {
    if (threadIdx.x < kWarp) {
      int found = 0;
      for (int first = 0; first < of; first += kWarp) {
        const int k = first + threadIdx.x;
        const bool is_drawn = k < of && weight_of(terms[k].weight) != 0.f;
        const unsigned drawn = __ballot_sync(~0u, is_drawn);
        if (is_drawn) numbers[found + __popc(drawn & ((1u << threadIdx.x) - 1))] = k;
        found += __popc(drawn);
      }
      if (threadIdx.x == 0) count = found;
    }
    __syncthreads();
  }
};

// Grid: (blocks of a channel's pixels, channels).
template <typename T, int V, bool kDrawnOnly>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumLaunch launch) {
  __shared__ float2 scales[kMaxTerms];  // mean and weight · rstd
  const Shape& shape = launch.shape;
  __shared__ DrawnTerms drawn_terms;
  if constexpr (kDrawnOnly) drawn_terms.find(launch.terms, launch.count);
  const int channel = blockIdx.y, count = kDrawnOnly ? drawn_terms.count : launch.count;
  const auto term = [&](int k) -> const Term& { return launch.terms[kDrawnOnly ? drawn_terms.numbers[k] : k]; };
  const unsigned end = unsigned(shape.batch) * shape.pixels / V;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const Position at = Position::of<V>(min(i, end - 1), shape);
  Values<V> z[kInFlight];
  const auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j < count) z[j] = Values<V>::load(at.in<const T>(term(first + j).z, channel, shape));
    }
  };
  load(0);  // on its way while the scales are computed
  for (int k = threadIdx.x; k < count; k += kThreads) {
    const float2 stats = stats_of(term(k).stats, channel);
    scales[k] = make_float2(stats.x, stats.y * weight_of(term(k).weight));
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
  if (i < end) y.store(at.in<T>(launch.y, channel, shape));
}

struct DotsLaunch {
  Shape shape;
  int count, pool_count;
  Divisor across, rows;  // V neighbours, of a row; rows of a picture
  Address mixing;
  Tensor g;
  float* dots;
  DotTerm terms[kMaxTerms];
  PooledTerms pools[kMaxPooled];
};

// Σ g · (max − mean) and Σ g · (avg − mean) over a thread's share of a part, with the pools of stride S formed from x
// once more: they are not kept.
template <typename T, int S, int V>
__device__ float2 pooled_dots(const DotsLaunch& launch, const PooledTerms& pool, int part, int channel) {
  constexpr int W = V == 1 ? 1 : V / S;  // windows that are formed together
  const Shape& shape = launch.shape;
  const PoolShape plane_shape{shape.batch, shape.channels, pool.height, pool.width, 0, 0, kPoolSize, S};
  const unsigned first = unsigned(part) * (kSpan / V) + threadIdx.x;
  const unsigned end = min(unsigned(shape.batch) * shape.pixels, unsigned(part + 1) * kSpan) / V;
  const T* x_planes = pointer<const T>(pool.x.data) + int64_t(channel) * pool.height * pool.width;
  const T* g_planes = pointer<const T>(launch.g.data) + int64_t(channel) * shape.pixels;
  const float max_mean = stats_of(pool.max_stats, channel).x, avg_mean = stats_of(pool.avg_stats, channel).x;
  float2 sums = make_float2(0.f, 0.f);
#pragma unroll 1
  for (int turn = 0; turn < kSpan / V / kThreads; ++turn) {
    const unsigned i = first + turn * kThreads;
    if (i >= end) break;
    const unsigned row = launch.across.divide(i), picture = launch.rows.divide(row);
    const int x = (i - row * launch.across.divisor) * V, y = row - picture * launch.rows.divisor;
    const T* plane = x_planes + picture * pool.x.batch_stride;
    const Values<V> g = Values<V>::load(g_planes + picture * launch.g.batch_stride + i * V - picture * shape.pixels);
#pragma unroll
    for (int w = 0; w < V; w += W) {
      const Windows<kPoolSize, S, W> windows(plane, y, x + w, plane_shape);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        sums.x = fmaf(g.v[w + v], windows.max[v] - max_mean, sums.x);
        sums.y = fmaf(g.v[w + v], windows.avg[v] - avg_mean, sums.y);
      }
    }
  }
  return sums;
}

// A multiprocessor's, as many as registers allow without spills: usual grids have 1,024.
#if __CUDA_ARCH__ >= 900
constexpr int kDotBlocks = 8;
#else
constexpr int kDotBlocks = 7;
#endif

// Grid: (parts, channels, splits). All warps of a block share the windows of a pool, which take as long as a dozen
// terms; terms go to the warps of all splits in turns.
template <typename T, int V, bool kDrawnOnly>
__global__ void __launch_bounds__(kThreads, V == 4 ? kDotBlocks : 3)
    dots_kernel(const __grid_constant__ DotsLaunch launch) {
  launching::let_next_begin();
  constexpr int kSlots = Share<V>::kSlots;
  const Shape& shape = launch.shape;
  __shared__ float2 pool_sums[kMaxPooled][kWarps];
  const int part = blockIdx.x, channel = blockIdx.y, warp = threadIdx.x / kWarp;
  const auto put = [&](int row, float sum) {
    launch.dots[int64_t(row * shape.channels + channel) * gridDim.x + part] = sum;
  };
  const auto store = [&](int row, float sum) {
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) put(row, sum);
  };
  const auto is_read = [&](int entry) {
    return !kDrawnOnly || entry < 0 || drawn::runs(launch.mixing + entry * sizeof(float));
  };
  const auto visit_pools = [&] {
    for (int k = blockIdx.z; k < launch.pool_count; k += gridDim.z) {
      const PooledTerms& pool = launch.pools[k];
      if (!(pool.max_row != 0 && is_read(pool.max_entry)) && !(pool.avg_row != 0 && is_read(pool.avg_entry))) continue;
      const float2 sums = pool.stride == 1 ? pooled_dots<T, 1, V>(launch, pool, part, channel)
                                           : pooled_dots<T, 2, V>(launch, pool, part, channel);
      const float2 of_warp = make_float2(warp_sum(sums.x), warp_sum(sums.y));
      if (threadIdx.x % kWarp == 0) pool_sums[k][warp] = of_warp;
    }
  };
  const auto visit_terms = [&] {
    const Share<V> share(part, shape);
    Values<V> g[kSlots] = {};
    share.template load<T>(g, launch.g, channel, shape);
    if (blockIdx.z == 0 && warp == 0) {
      float sum = 0.f;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum += g[slot].v[v];
      }
      store(0, sum);
    }
#pragma unroll 2
    for (int k = blockIdx.z * kWarps + warp; k < launch.count; k += gridDim.z * kWarps) {
      const DotTerm& term = launch.terms[k];
      if (!is_read(term.entry)) continue;
      Values<V> z[kSlots] = {};
      share.template load<T>(z, term.z, channel, shape);
      const float mean = stats_of(term.stats, channel).x;
      float sum = 0.f;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum = fmaf(g[slot].v[v], z[slot].v[v] - mean, sum);
      }
      store(term.row, sum);
    }
  };
  // Pools keep the arithmetic units busy and terms the memory, so neighbouring blocks begin with the one and the other.
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if ((part + i) % 2 == 0) visit_pools();
    else visit_terms();
  }
  __syncthreads();
  const int k = threadIdx.x * gridDim.z + blockIdx.z;
  if (k >= launch.pool_count) return;
  float2 total = pool_sums[k][0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) total.x += pool_sums[k][i].x, total.y += pool_sums[k][i].y;
  if (launch.pools[k].max_row != 0) put(launch.pools[k].max_row, total.x);
  if (launch.pools[k].avg_row != 0) put(launch.pools[k].avg_row, total.y);
}

constexpr int kCoefficientThreads = 512;
constexpr int kCoefficientWarps = kCoefficientThreads / kWarp;

struct CoefficientsLaunch {
  int channels, parts, lanes;
  bool drawn_only;
  float scale;  // 1 / (B · H · W), or 0 where the statistics are constants
  const float* dots;
  TermGradient terms[kMaxTerms];
};

// The threads of a channel: a power of two, so that there are threads for all channels if that can be.
int coefficient_lanes(int channels) {
  int lanes = kWarp;
  while (lanes > 1 && lanes * channels > kCoefficientThreads) lanes /= 2;
  return lanes;
}

// Grid: terms.
__global__ void __launch_bounds__(kCoefficientThreads)
    coefficients_kernel(const __grid_constant__ CoefficientsLaunch launch) {
  launching::await_kernel_before();
  __shared__ float by_warp[kCoefficientWarps];
  const TermGradient& term = launch.terms[blockIdx.x];
  const int lanes = launch.lanes, lane = threadIdx.x % lanes;
  const float weight = weight_of(term.weight);
  const bool is_constant = launch.drawn_only && weight == 0.f;
  if (term.coef == 0 && !is_constant) return;  // a term that is 0
  float grad_weight = 0.f;
  // All threads of a warp stay in the loop as long as one of them has a channel, since they exchange sums.
  for (int first = 0; first < launch.channels; first += kCoefficientThreads / lanes) {
    const int channel = first + threadIdx.x / lanes, known = min(channel, launch.channels - 1);
    const float2 stats = stats_of(is_constant ? 0 : term.stats, known);
    const float* g = launch.dots + int64_t(known) * launch.parts;
    const float* gz = is_constant ? g : g + int64_t(1 + blockIdx.x) * launch.channels * launch.parts;
    float sum = 0.f, dot = 0.f;
#pragma unroll 4
    for (int part = lane; part < launch.parts; part += lanes) sum += __ldg(g + part), dot += __ldg(gz + part);
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(~0u, sum, offset);
      dot += __shfl_xor_sync(~0u, dot, offset);
    }
    if (lane != 0 || channel >= launch.channels) continue;
    const float rstd = stats.y;
    grad_weight = fmaf(dot, rstd, grad_weight);
    if (term.coef == 0) continue;
    const float scale = term.stats == 0 ? 0.f : launch.scale;
    const float slope = -weight * rstd * rstd * rstd * dot * scale;
    const float offset = -weight * rstd * sum * scale - slope * stats.x;
    pointer<float4>(term.coef)[channel] = make_float4(weight * rstd, slope, offset, 0.f);
  }
  if (term.grad_weight == 0) return;
  grad_weight = warp_sum(grad_weight);
  if (threadIdx.x % kWarp == 0) by_warp[threadIdx.x / kWarp] = grad_weight;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kCoefficientWarps; ++warp) total += by_warp[warp];
  *pointer<float>(term.grad_weight) = total;
}

struct AffineLaunch {
  Shape shape;
  AffineJob jobs[64];
};

// Grid: (blocks of a channel's pixels, channels, jobs).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) affine_kernel(const __grid_constant__ AffineLaunch launch) {
  const Shape& shape = launch.shape;
  const AffineJob& job = launch.jobs[blockIdx.z];
  const int channel = blockIdx.y;
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= unsigned(shape.batch) * shape.pixels / V) return;
  const Position at = Position::of<V>(i, shape);
  const Values<V> g = Values<V>::load(at.in<const T>(job.g, channel, shape));
  const Values<V> z = Values<V>::load(at.in<const T>(job.z, channel, shape));
  const float4 coef = __ldg(pointer<const float4>(job.coef) + channel);
  Values<V> dz;
#pragma unroll
  for (int v = 0; v < V; ++v) dz.v[v] = fmaf(coef.x, g.v[v], fmaf(coef.y, z.v[v], coef.z));
  dz.store(at.in_contiguous<T>(job.dz, channel, shape));
}

}  // namespace

void sum(const Shape& shape, const std::vector<Term>& terms, bool drawn_only, Tensor y, Address stream) {
  const bool is_wide =
      shape.pixels % 4 == 0 && wide(y) && all_wide(terms, [](const Term& term) { return term.z; });
  SumLaunch parameters{shape, int(terms.size()), y, {}};
  copy_into(parameters.terms, terms, "too many terms in one node");
  with_variant(shape.bf16, is_wide, [&](auto storage, auto V) {
    using T = typename decltype(storage)::type;
    const auto kernel = drawn_only ? sum_kernel<T, V(), true> : sum_kernel<T, V(), false>;
    launch(kernel, dim3(blocks_of(shape, V()), shape.channels), kThreads, 0, stream, parameters);
  });
}

void dots(const Shape& shape, int width, const std::vector<DotTerm>& terms, const std::vector<PooledTerms>& pools,
          Address mixing, Tensor g, Address dots, Address stream) {
  const bool is_wide = shape.pixels % 4 == 0 && wide(g) &&
                       all_wide(terms, [](const DotTerm& term) { return term.z; }) &&
                       (pools.empty() || width % 4 == 0) &&
                       std::all_of(pools.begin(), pools.end(), [](const PooledTerms& pool) {
                         return wide(pool.x) && pool.width % 4 == 0;
                       });
  constexpr int kWantedBlocks = 1024;  // about eight for each of 132 multiprocessors
  const int blocks = parts(shape) * shape.channels;
  const int most_splits = std::max(1, ceil_div(terms.size() + pools.size(), kWarps));
  const int splits = std::clamp(ceil_div(kWantedBlocks, blocks), 1, most_splits);
  with_variant(shape.bf16, is_wide, [&](auto storage, auto V) {
    using T = typename decltype(storage)::type;
    DotsLaunch parameters{shape, int(terms.size()), int(pools.size()), Divisor(std::max(1, width / V())),
                          Divisor(shape.pixels / width), mixing, g, reinterpret_cast<float*>(dots), {}, {}};
    copy_into(parameters.terms, terms, "too many terms in one node");
    copy_into(parameters.pools, pools, "too many pools in one node");
    const auto kernel = mixing == 0 ? dots_kernel<T, V(), false> : dots_kernel<T, V(), true>;
    launch(kernel, dim3(parts(shape), shape.channels, splits), kThreads, 0, stream, parameters);
  });
}

void coefficients(const Shape& shape, bool training, const std::vector<TermGradient>& terms, bool drawn_only,
                  Address dots, bool early, Address stream) {
  const float count = float(shape.batch) * shape.pixels;
  CoefficientsLaunch parameters{shape.channels, parts(shape), coefficient_lanes(shape.channels),
                                drawn_only, training ? 1.f / count : 0.f, reinterpret_cast<const float*>(dots), {}};
  copy_into(parameters.terms, terms, "too many terms in one node");
  launch_early(coefficients_kernel, dim3(terms.size()), kCoefficientThreads, stream, parameters, early);
}

void affine_gradient(const Shape& shape, const std::vector<AffineJob>& jobs, Address stream) {
  const bool is_wide = shape.pixels % 4 == 0 && all_wide(jobs, [](const AffineJob& job) { return job.g; }) &&
                       all_wide(jobs, [](const AffineJob& job) { return job.z; });
  AffineLaunch parameters{shape, {}};
  in_batches(jobs, std::size(parameters.jobs), [&](size_t first, size_t count) {
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    with_variant(shape.bf16, is_wide, [&](auto storage, auto V) {
      using T = typename decltype(storage)::type;
      launch(affine_kernel<T, V()>, dim3(blocks_of(shape, V()), shape.channels, count), kThreads, 0, stream,
             parameters);
    });
  });
}

}  // namespace node
