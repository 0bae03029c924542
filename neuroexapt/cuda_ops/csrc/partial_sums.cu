// Sums over parts; partial_sums.h has the legend.
//
// A thread has V neighbouring columns and every n-th part, and loads kInFlight parts before it uses the first: what
// these kernels wait for is memory that answers late. The n threads of the same columns then add up what they have.

#include "partial_sums.h"

#include <algorithm>
#include <type_traits>

#include "drawn.cuh"
#include "launch.cuh"

namespace partial_sums {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;
constexpr int kMostSplits = 32;  // so that a warp reads at least 8 · V neighbouring columns
constexpr size_t kMaxJobs = 128;

struct Launch {
  Job jobs[kMaxJobs];
};

template <int V>
struct Columns {
  float v[V] = {};

  __device__ static Columns load(const float* source) {
    Columns columns;
    if constexpr (V == 4) {
      const float4 bits = __ldg(reinterpret_cast<const float4*>(source));
      columns.v[0] = bits.x, columns.v[1] = bits.y, columns.v[2] = bits.z, columns.v[3] = bits.w;
    } else {
      columns.v[0] = __ldg(source);
    }
    return columns;
  }

  __device__ void add(const Columns& other) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += other.v[i];
  }
};

// The threads that share columns: a power of two, enough for each to load all its parts at once.
__host__ __device__ int splits_of(const Job& job) {
  int splits = 1;
  while (splits < kMostSplits && splits * kInFlight < job.parts) splits *= 2;
  return splits;
}

template <int V>
__host__ __device__ int columns_of_block(const Job& job) {
  return kThreads / splits_of(job) * V;
}

// Grid: (blocks of columns, jobs).
template <int V>
__global__ void __launch_bounds__(kThreads, 4) sum_kernel(const __grid_constant__ Launch launch) {
  launching::await_kernel_before();
  __shared__ Columns<V> by_thread[kThreads];
  const Job& job = launch.jobs[blockIdx.y];
  const int splits = splits_of(job), across = kThreads / splits;
  const int first_column = blockIdx.x * across * V;
  if (first_column >= job.size) return;
  const int column = first_column + int(threadIdx.x) % across * V, split = threadIdx.x / across;
  const int job_parts = drawn::runs(job.mixing) ? job.parts : 0;
  Columns<V> sum;
  if (column < job.size) {
    const float* partial = reinterpret_cast<const float*>(job.partial) + column;
    for (int first = split; first < job_parts; first += splits * kInFlight) {
      Columns<V> parts[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int part = min(first + i * splits, job.parts - 1);
        parts[i] = Columns<V>::load(partial + int64_t(part) * job.size);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (first + i * splits < job.parts) sum.add(parts[i]);
      }
    }
  }
  by_thread[threadIdx.x] = sum;
  __syncthreads();
  // Now a thread for each column.
  const float* columns = by_thread[0].v;
  const int width = across * V;
  for (int i = threadIdx.x; i < width && first_column + i < job.size; i += kThreads) {
    float total = 0.f;
#pragma unroll 8
    for (int n = 0; n < splits; ++n) total += columns[n * width + i];
    reinterpret_cast<float*>(job.sum)[first_column + i] = total;
  }
}

bool is_wide(const Job& job) { return job.partial % 16 == 0 && job.size % 4 == 0; }

}  // namespace

void add_up(const std::vector<Job>& jobs, bool early, Address stream) {
  const auto run = [&](auto V) {
    for (size_t first = 0; first < jobs.size(); first += kMaxJobs) {
      const size_t count = std::min(jobs.size() - first, kMaxJobs);
      Launch parameters{};
      std::copy_n(jobs.begin() + first, count, parameters.jobs);
      int blocks = 1;
      for (size_t i = 0; i < count; ++i) {
        const Job& job = parameters.jobs[i];
        const int columns = columns_of_block<V()>(job);
        blocks = std::max(blocks, (job.size + columns - 1) / columns);
      }
      launching::launch_early(sum_kernel<V()>, dim3(blocks, count), kThreads, stream, parameters, early);
    }
  };
  if (std::all_of(jobs.begin(), jobs.end(), is_wide)) run(std::integral_constant<int, 4>());
  else run(std::integral_constant<int, 1>());
}

}  // namespace partial_sums
