// Weighted sum y = Σ_k w_k · x_k over a list of tensors, and its gradients; softmax_sum.h has the legend.
//
// Every kernel is bound by memory: forward reads K tensors and writes one; backward reads the output's
// gradient and each operand once and writes each operand's gradient once. Accesses are 16 bytes wide,
// sums are kept in fp32, and the operands' addresses are kernel parameters, so nothing is uploaded and
// a launch can be captured in a CUDA graph.

#include "softmax_sum.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "launch.cuh"

namespace {

using launching::check;

constexpr int kWarp = 32;
constexpr int kForwardThreads = 128;
constexpr int kBackwardThreads = 512;
constexpr int kBackwardBlocks = 2;  // of a multiprocessor, which leaves 64 registers a thread
constexpr int kReduceThreads = 512;
constexpr size_t kGrantedSharedBytes = 47 * 1024;  // 48 KB less the weights; more must be asked for
constexpr int kInFlight = 4;  // operands whose loads a thread issues before it uses the first

struct Operands {
  const void* x[kMaxOperands];
};

struct Gradients {
  void* x[kMaxOperands];
};

// One element in an access: for tails, and for addresses that allow no more.
template <typename T>
struct Single {
  using Bits = T;
  static constexpr int V = 1;

  static __device__ Bits load(const void* base, int64_t i) { return __ldg(static_cast<const T*>(base) + i); }

  static __device__ void store(void* base, int64_t i, const float (&values)[V]) {
    static_cast<T*>(base)[i] = from_float(values[0]);
  }

  // Spelled out, since PyTorch's build flags turn the half types' implicit conversions off.
  static __device__ void unpack(Bits bits, float (&values)[V]) {
    if constexpr (std::is_same_v<T, __half>) values[0] = __half2float(bits);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>) values[0] = __bfloat162float(bits);
    else values[0] = bits;
  }

 private:
  static __device__ T from_float(float value) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
    else return value;
  }
};

// 16 bytes in an access. They stay in four registers until they are used: as an array of halves they
// would take one register each.
template <typename T>
struct Wide {
  using Bits = uint4;
  static constexpr int V = sizeof(Bits) / sizeof(T);

  static __device__ Bits load(const void* base, int64_t i) {
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(base) + i));
  }

  static __device__ void store(void* base, int64_t i, const float (&values)[V]) {
    constexpr int kStep = V / 4;
    const uint4 bits = make_uint4(word(values), word(values + kStep), word(values + 2 * kStep),
                                  word(values + 3 * kStep));
    // An intrinsic, since the compiler splits a plain assignment into four narrow stores.
    __stwb(reinterpret_cast<uint4*>(static_cast<T*>(base) + i), bits);
  }

  static __device__ void unpack(Bits bits, float (&values)[V]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (std::is_same_v<T, float>) {
        values[w] = __uint_as_float(words[w]);
      } else if constexpr (std::is_same_v<T, __half>) {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[w]));
        values[2 * w] = pair.x;
        values[2 * w + 1] = pair.y;
      } else {  // bf16 is the upper half of an fp32
        values[2 * w] = __uint_as_float(words[w] << 16);
        values[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
      }
    }
  }

 private:
  static __device__ uint32_t word(const float* values) {
    if constexpr (std::is_same_v<T, float>) {
      return __float_as_uint(values[0]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(values[0], values[1]);
      return reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
      return reinterpret_cast<const uint32_t&>(pair);
    }
  }
};

// What a thread has loaded of kInFlight operands.
template <typename Access>
using Group = typename Access::Bits[kInFlight];

// Operands first, first + 1, … < K at element i.
template <typename Access>
__device__ void load_group(Group<Access>& x, const Operands& xs, int first, int K, int64_t i) {
#pragma unroll
  for (int j = 0; j < kInFlight; ++j) {
    if (first + j < K) x[j] = Access::load(xs.x[first + j], i);
  }
}

__device__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

__device__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// Fills weights [K] in shared memory; the block's first warp does the work.
__device__ void read_weights(float* weights, const float* scores, int K, bool is_logits) {
  const int lane = threadIdx.x;
  if (lane < kWarp) {
    float top = -INFINITY;
#pragma unroll 1
    for (int k = lane; k < K; k += kWarp) top = fmaxf(top, scores[k]);
    top = warp_max(top);
    float total = 0.f;
#pragma unroll 1
    for (int k = lane; k < K; k += kWarp) {
      weights[k] = is_logits ? expf(scores[k] - top) : scores[k];
      total += weights[k];
    }
    total = warp_sum(total);
    if (is_logits) {
#pragma unroll 1
      for (int k = lane; k < K; k += kWarp) weights[k] /= total;
    }
  }
  __syncthreads();
}

// y[i : i + V] = Σ_k weights[k] · xs[k][i : i + V], where x already holds the first group of operands.
template <typename Access>
__device__ void sum_groups(Group<Access>& x, const Operands& xs, const float* weights, void* y, int64_t i,
                           int K) {
  float sum[Access::V] = {};
  for (int first = 0; first < K; first += kInFlight) {
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j < K) {
        float values[Access::V];
        Access::unpack(x[j], values);
#pragma unroll
        for (int v = 0; v < Access::V; ++v) sum[v] += weights[first + j] * values[v];
      }
    }
    load_group<Access>(x, xs, first + kInFlight, K, i);
  }
  Access::store(y, i, sum);
}

template <typename T, typename Access>
__global__ void __launch_bounds__(kForwardThreads)
    softmax_sum_fwd_kernel(const __grid_constant__ Operands xs, const float* scores, void* y, int64_t n,
                           int K, bool is_logits) {
  __shared__ float weights[kMaxOperands];
  int64_t i = (int64_t(blockIdx.x) * kForwardThreads + threadIdx.x) * Access::V;
  Group<Access> x;
  if (i + Access::V <= n) load_group<Access>(x, xs, 0, K, i);  // on its way while the softmax is taken
  read_weights(weights, scores, K, is_logits);

  if (i + Access::V <= n) {
    sum_groups<Access>(x, xs, weights, y, i, K);
  } else {
    for (; i < n; ++i) {
      Group<Single<T>> tail;
      load_group<Single<T>>(tail, xs, 0, K, i);
      sum_groups<Single<T>>(tail, xs, weights, y, i, K);
    }
  }
}

// What a thread has loaded at element i before it needs any of it.
template <typename Access>
struct Loaded {
  typename Access::Bits g;
  Group<Access> x;
};

template <typename Access, bool kScores>
__device__ void load_backward(Loaded<Access>& loaded, const void* grad_y, const Operands& xs, int64_t i,
                              int K) {
  loaded.g = Access::load(grad_y, i);
  if (kScores) load_group<Access>(loaded.x, xs, 0, K, i);
}

// grad_xs[k][i : i + V] = weights[k] · g and, with kScores, dots[k] += ⟨g, xs[k][i : i + V]⟩, where
// loaded already holds g and the first group of operands.
template <typename Access, bool kScores>
__device__ void backward_groups(Loaded<Access>& loaded, const Operands& xs, const float* weights,
                                const Gradients& grad_xs, float* dots, int64_t i, int K) {
  float g[Access::V];
  Access::unpack(loaded.g, g);
  for (int first = 0; first < K; first += kInFlight) {
    if (kScores) {
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j < K) {
          float x[Access::V], dot = 0.f;
          Access::unpack(loaded.x[j], x);
#pragma unroll
          for (int v = 0; v < Access::V; ++v) dot += g[v] * x[v];
          dots[(first + j) * kBackwardThreads] += dot;
        }
      }
      load_group<Access>(loaded.x, xs, first + kInFlight, K, i);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int k = first + j;
      if (k < K && grad_xs.x[k] != nullptr) {
        float scaled[Access::V];
#pragma unroll
        for (int v = 0; v < Access::V; ++v) scaled[v] = weights[k] * g[v];
        Access::store(grad_xs.x[k], i, scaled);
      }
    }
  }
}

// Gradients of the operands and, with kScores, this block's share of ⟨g, x_k⟩ in partials [K, gridDim.x].
template <typename T, typename Access, bool kScores>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    softmax_sum_bwd_kernel(const void* grad_y, const __grid_constant__ Operands xs, const float* scores,
                           const __grid_constant__ Gradients grad_xs, float* partials, int64_t n, int K,
                           bool is_logits) {
  __shared__ float weights[kMaxOperands];
  // [K, kBackwardThreads]: each thread's own sums. K is known at run time only, and registers cannot
  // be indexed; shared memory has the bandwidth to spare.
  extern __shared__ float dots[];
  const int64_t step = int64_t(gridDim.x) * kBackwardThreads * Access::V;
  int64_t i = (int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x) * Access::V;
  Loaded<Access> loaded;
  if (i + Access::V <= n) load_backward<Access, kScores>(loaded, grad_y, xs, i, K);
  read_weights(weights, scores, K, is_logits);

  float* own_dots = dots + threadIdx.x;
  if (kScores) {
#pragma unroll 1
    for (int k = 0; k < K; ++k) own_dots[k * kBackwardThreads] = 0.f;
  }
  while (i + Access::V <= n) {
    backward_groups<Access, kScores>(loaded, xs, weights, grad_xs, own_dots, i, K);
    i += step;
    if (i + Access::V <= n) load_backward<Access, kScores>(loaded, grad_y, xs, i, K);
  }
  for (; i < n; ++i) {
    Loaded<Single<T>> tail;
    load_backward<Single<T>, kScores>(tail, grad_y, xs, i, K);
    backward_groups<Single<T>, kScores>(tail, xs, weights, grad_xs, own_dots, i, K);
  }

  if (kScores) {
    __syncthreads();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int k = warp; k < K; k += kBackwardThreads / kWarp) {
      float sum = 0.f;
#pragma unroll
      for (int t = lane; t < kBackwardThreads; t += kWarp) sum += dots[k * kBackwardThreads + t];
      sum = warp_sum(sum);
      if (lane == 0) partials[int64_t(k) * gridDim.x + blockIdx.x] = sum;
    }
  }
}

// One block adds up partials [K, splits] in a fixed order and applies the softmax's own gradient,
// grad_logits_k = w_k · (dot_k − Σ_j w_j · dot_j).
__global__ void __launch_bounds__(kReduceThreads)
    softmax_sum_bwd_reduce_kernel(const float* partials, const float* scores, float* grad_scores,
                                  int splits, int K, bool is_logits) {
  __shared__ float weights[kMaxOperands], dots[kMaxOperands];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int k = warp; k < K; k += kReduceThreads / kWarp) {
    float sum = 0.f;
#pragma unroll  // all loads at once: this kernel lasts as long as its chain of loads
    for (int s = lane; s < kMaxSplits; s += kWarp) {
      if (s < splits) sum += partials[k * splits + s];
    }
    sum = warp_sum(sum);
    if (lane == 0) dots[k] = sum;
  }
  read_weights(weights, scores, K, is_logits);  // its barrier also publishes dots

  if (threadIdx.x < K) {
    const int k = threadIdx.x;
    float mean = 0.f;
    for (int j = 0; j < K; ++j) mean += weights[j] * dots[j];
    grad_scores[k] = is_logits ? weights[k] * (dots[k] - mean) : dots[k];
  }
}

bool aligned(const std::vector<Address>& addresses) {
  return std::all_of(addresses.begin(), addresses.end(), [](Address a) { return a % 16 == 0; });
}

template <typename Struct>
Struct pack(const std::vector<Address>& addresses) {
  Struct packed{};
  for (size_t k = 0; k < addresses.size(); ++k) packed.x[k] = reinterpret_cast<void*>(addresses[k]);
  return packed;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, typename Access>
void launch_forward(const std::vector<Address>& xs, const float* scores, void* y, int64_t n,
                    bool is_logits, cudaStream_t stream) {
  const int64_t blocks = ceil_div(n, int64_t(kForwardThreads) * Access::V);
  softmax_sum_fwd_kernel<T, Access><<<blocks, kForwardThreads, 0, stream>>>(pack<Operands>(xs), scores, y,
                                                                            n, xs.size(), is_logits);
  check(cudaGetLastError());
}

template <typename T, typename Access>
void launch_backward(const void* grad_y, const std::vector<Address>& xs, const float* scores,
                     const std::vector<Address>& grad_xs, float* grad_scores, float* partials, int64_t n,
                     bool is_logits, cudaStream_t stream) {
  const int K = grad_xs.size();
  const int splits = std::min<int64_t>(kMaxSplits, ceil_div(n, int64_t(kBackwardThreads) * Access::V));
  const bool wants_scores = grad_scores != nullptr;
  const auto kernel =
      wants_scores ? softmax_sum_bwd_kernel<T, Access, true> : softmax_sum_bwd_kernel<T, Access, false>;
  const size_t shared_bytes = wants_scores ? sizeof(float) * K * kBackwardThreads : 0;
  if (shared_bytes > kGrantedSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<splits, kBackwardThreads, shared_bytes, stream>>>(
      grad_y, pack<Operands>(xs), scores, pack<Gradients>(grad_xs), partials, n, K, is_logits);
  check(cudaGetLastError());
  if (wants_scores) {
    softmax_sum_bwd_reduce_kernel<<<1, kReduceThreads, 0, stream>>>(partials, scores, grad_scores, splits,
                                                                    K, is_logits);
    check(cudaGetLastError());
  }
}

// Calls f with the element type and the widest access that the addresses allow.
template <typename F>
void dispatch(DType dtype, bool wide, F f) {
  const auto call = [&](auto element) {
    using T = decltype(element);
    return wide ? f(element, Wide<T>()) : f(element, Single<T>());
  };
  switch (dtype) {
    case DType::kFloat32: return call(float());
    case DType::kFloat16: return call(__half());
    case DType::kBFloat16: return call(__nv_bfloat16());
  }
}

}  // namespace

void softmax_sum_forward(const std::vector<Address>& xs, Address scores, Address y, int64_t n, DType dtype,
                         bool is_logits, Address stream) {
  dispatch(dtype, aligned(xs) && aligned({y}), [&](auto element, auto access) {
    launch_forward<decltype(element), decltype(access)>(
        xs, reinterpret_cast<const float*>(scores), reinterpret_cast<void*>(y), n, is_logits,
        reinterpret_cast<cudaStream_t>(stream));
  });
}

void softmax_sum_backward(Address grad_y, const std::vector<Address>& xs, Address scores,
                          const std::vector<Address>& grad_xs, Address grad_scores, Address partials,
                          int64_t n, DType dtype, bool is_logits, Address stream) {
  dispatch(dtype, aligned(xs) && aligned(grad_xs) && aligned({grad_y}), [&](auto element, auto access) {
    launch_backward<decltype(element), decltype(access)>(
        reinterpret_cast<const void*>(grad_y), xs, reinterpret_cast<const float*>(scores), grad_xs,
        reinterpret_cast<float*>(grad_scores), reinterpret_cast<float*>(partials), n, is_logits,
        reinterpret_cast<cudaStream_t>(stream));
  });
}
