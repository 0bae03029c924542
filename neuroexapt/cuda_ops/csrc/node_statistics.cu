// BatchNorm statistics; node.h has the legend.

#include "drawn.cuh"
#include "node_common.cuh"

namespace node {
namespace {

struct MomentsLaunch {
  Shape shape;
  MomentsJob jobs[kMaxTerms];
};

// Grid: (parts / kWarps, channels, jobs).
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) moments_kernel(const __grid_constant__ MomentsLaunch launch) {
  launching::let_next_begin();
  const Shape& shape = launch.shape;
  const MomentsJob& job = launch.jobs[blockIdx.z];
  const int part = blockIdx.x * kWarps + threadIdx.x / kWarp, channel = blockIdx.y;
  if (part >= part_count(shape)) return;
  const Share<V> share(part, shape);
  Values<V> values[Share<V>::kSlots];
  share.template load<T>(values, job.z, channel, shape);
  store_moments(pointer<float>(job.moments) + (int64_t(part) * shape.channels + channel) * 3, values,
                share.count);
}

// A block merges the parts of kMergeChannels channels; neighbouring threads have neighbouring channels, so that
// they read neighbouring words. Each thread has the parts of a split, loaded in one go where there are no more
// than kMergeSplits * kMergeParts.
constexpr int kMergeChannels = 16, kMergeSplits = 32, kMergeParts = 8;
constexpr int kMergeWarps = kMergeChannels * kMergeSplits / kWarp;

struct StatsLaunch {
  int channels;
  float eps, momentum;
  StatsJob jobs[64];
};

// Merged as Chan, Golub and LeVeque do.
struct Moments {
  float count = 0.f, mean = 0.f, squares = 0.f;

  __device__ void merge(const Moments& other) {
    const float total = count + other.count, difference = other.mean - mean;
    const float share = total > 0.f ? __fdividef(other.count, total) : 0.f;
    mean = fmaf(difference, share, mean);
    squares += fmaf(difference * difference * count, share, other.squares);
    count = total;
  }

  __device__ Moments of_neighbour(int offset) const {
    return {__shfl_xor_sync(~0u, count, offset), __shfl_xor_sync(~0u, mean, offset),
            __shfl_xor_sync(~0u, squares, offset)};
  }
};

// Parts first, first + kMergeSplits, …, kMergeParts of them at most.
__device__ Moments merge_parts(const float* moments, int first, int parts, int channels) {
  Moments part[kMergeParts];
#pragma unroll
  for (int i = 0; i < kMergeParts; ++i) {
    const int number = first + i * kMergeSplits;
    const float* m = moments + int64_t(min(number, parts - 1)) * (channels * 3);
    part[i] = {__ldg(m), __ldg(m + 1), __ldg(m + 2)};
    if (number >= parts) part[i].count = part[i].squares = 0.f;
  }
  Moments all;
#pragma unroll
  for (int i = 0; i < kMergeParts; ++i) {
    all.count += part[i].count;
    all.mean = fmaf(part[i].count, part[i].mean, all.mean);
  }
  all.mean = __fdividef(all.mean, fmaxf(all.count, 1.f));
#pragma unroll
  for (int i = 0; i < kMergeParts; ++i) {
    const float difference = part[i].mean - all.mean;
    all.squares += fmaf(part[i].count * difference, difference, part[i].squares);
  }
  return all;
}

__device__ float2 stats_from(float mean, float variance, float eps) {
  return make_float2(mean, 1.f / sqrtf(variance + eps));
}

// Grid: (blocks of channels, jobs).
__global__ void __launch_bounds__(kMergeChannels* kMergeSplits)
    finalize_kernel(const __grid_constant__ StatsLaunch launch) {
  launching::await_kernel_before();
  __shared__ Moments by_warp[kMergeWarps][kMergeChannels + 1];  // one more against bank conflicts
  const StatsJob& job = launch.jobs[blockIdx.y];
  const int first_channel = blockIdx.x * kMergeChannels;
  // In the end neighbouring threads have what the warps left of one channel.
  const int final_channel = first_channel + int(threadIdx.x) / kMergeWarps;
  const bool finishes = threadIdx.x < kMergeChannels * kMergeWarps && threadIdx.x % kMergeWarps == 0 &&
                        final_channel < launch.channels;
  float* running_mean = pointer<float>(job.running_mean) + final_channel;
  float* running_var = pointer<float>(job.running_var) + final_channel;
  float2* stats = pointer<float2>(job.stats) + final_channel;
  float old_mean = 0.f, old_var = 0.f;
  if (finishes && job.running_mean != 0) old_mean = *running_mean, old_var = *running_var;
  const bool updates = job.running_mean != 0 && drawn::runs(job.mixing);
  if (job.moments == 0) {
    if (finishes) *stats = stats_from(old_mean, old_var, launch.eps);
    return;
  }

  const int channel = first_channel + threadIdx.x % kMergeChannels, split = threadIdx.x / kMergeChannels;
  Moments sum;
  if (channel < launch.channels) {
    const float* moments = pointer<const float>(job.moments) + channel * 3;
    for (int first = split; first < job.parts; first += kMergeSplits * kMergeParts) {
      sum.merge(merge_parts(moments, first, job.parts, launch.channels));
    }
  }
#pragma unroll
  for (int offset = kMergeChannels; offset < kWarp; offset *= 2) sum.merge(sum.of_neighbour(offset));
  if (threadIdx.x % kWarp < kMergeChannels) by_warp[threadIdx.x / kWarp][threadIdx.x % kMergeChannels] = sum;
  __syncthreads();
  if (threadIdx.x >= kMergeChannels * kMergeWarps) return;
  sum = by_warp[threadIdx.x % kMergeWarps][threadIdx.x / kMergeWarps];
#pragma unroll
  for (int offset = 1; offset < kMergeWarps; offset *= 2) sum.merge(sum.of_neighbour(offset));
  if (!finishes) return;
  *stats = stats_from(sum.mean, sum.squares / sum.count, launch.eps);
  if (updates) {
    *running_mean = fmaf(1.f - launch.momentum, old_mean, launch.momentum * sum.mean);
    *running_var = fmaf(1.f - launch.momentum, old_var, launch.momentum * sum.squares / (sum.count - 1.f));
    if (final_channel == 0) ++*pointer<int64_t>(job.num_batches_tracked);
  }
}

}  // namespace

int parts(const Shape& shape) { return part_count(shape); }

void plane_moments(const Shape& shape, const std::vector<MomentsJob>& jobs, Address stream) {
  const bool is_wide = shape.pixels % 4 == 0 && all_wide(jobs, [](const MomentsJob& job) { return job.z; });
  MomentsLaunch parameters{shape, {}};
  in_batches(jobs, kMaxTerms, [&](size_t first, size_t count) {
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    with_variant(shape.bf16, is_wide, [&](auto storage, auto V) {
      launch(moments_kernel<typename decltype(storage)::type, V()>,
             dim3(ceil_div(parts(shape), kWarps), shape.channels, count), kThreads, 0, stream, parameters);
    });
  });
}

void finalize(int channels, float eps, float momentum, const std::vector<StatsJob>& jobs, bool early, Address stream) {
  StatsLaunch parameters{channels, eps, momentum, {}};
  in_batches(jobs, std::size(parameters.jobs), [&](size_t first, size_t count) {
    std::copy_n(jobs.begin() + first, count, parameters.jobs);
    launch_early(finalize_kernel, dim3(ceil_div(channels, kMergeChannels), count), kMergeChannels * kMergeSplits,
                 stream, parameters, early);
  });
}

}  // namespace node
