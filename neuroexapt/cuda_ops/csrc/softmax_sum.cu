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
#include <stdexcept>
#include <type_traits>

namespace {

constexpr int kWarp = 32;
constexpr int kForwardThreads = 256;
constexpr int kBackwardThreads = 128;
constexpr int kBackwardBlocks = 8;  // of a multiprocessor, which leaves 64 registers a thread
constexpr int kReduceThreads = 512;
constexpr int kInFlight = 4;  // operands whose loads a thread issues before it uses the first

struct Operands {
  const void* x[kMaxOperands];
};

struct Gradients {
  void* x[kMaxOperands];
};

// Spelled out, since PyTorch's build flags turn the half types' implicit conversions off.
__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return x;
}

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <typename T, int V>
__device__ Pack<T, V> load(const void* base, int64_t i) {
  const T* source = static_cast<const T*>(base) + i;
  if constexpr (V == 1) {
    return {__ldg(source)};
  } else {
    static_assert(sizeof(Pack<T, V>) == sizeof(uint4));
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(source));
    return reinterpret_cast<const Pack<T, V>&>(bits);
  }
}

template <typename T, int V>
__device__ void store(void* base, int64_t i, const float (&values)[V]) {
  T* target = static_cast<T*>(base) + i;
  if constexpr (V == 1) {
    *target = from_float<T>(values[0]);
  } else {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = from_float<T>(values[v]);
    const uint4 bits = reinterpret_cast<const uint4&>(pack);
    // Inline, since the compiler splits a plain assignment into four narrow stores.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(__cvta_generic_to_global(target)), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
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

// y[i : i + V] = Σ_k weights[k] · xs[k][i : i + V]
template <typename T, int V>
__device__ void sum_pack(const Operands& xs, const float* weights, void* y, int64_t i, int K) {
  float sum[V] = {};
#pragma unroll 8  // so that the loads of several operands are in flight together
  for (int k = 0; k < K; ++k) {
    const Pack<T, V> x = load<T, V>(xs.x[k], i);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += weights[k] * to_float(x.value[v]);
  }
  store<T, V>(y, i, sum);
}

template <typename T, int V>
__global__ void __launch_bounds__(kForwardThreads)
    softmax_sum_fwd_kernel(const __grid_constant__ Operands xs, const float* scores, void* y, int64_t n,
                           int K, bool is_logits) {
  __shared__ float weights[kMaxOperands];
  read_weights(weights, scores, K, is_logits);

  int64_t i = (int64_t(blockIdx.x) * kForwardThreads + threadIdx.x) * V;
  if (i + V <= n) {
    sum_pack<T, V>(xs, weights, y, i, K);
  } else {
    for (; i < n; ++i) sum_pack<T, 1>(xs, weights, y, i, K);
  }
}

template <typename T, int V>
__device__ float dot(const Pack<T, V>& a, const Pack<T, V>& b) {
  float sum = 0.f;
#pragma unroll
  for (int v = 0; v < V; ++v) sum += to_float(a.value[v]) * to_float(b.value[v]);
  return sum;
}

template <typename T, int V>
__device__ void store_scaled(void* base, int64_t i, float weight, const Pack<T, V>& pack) {
  float scaled[V];
#pragma unroll
  for (int v = 0; v < V; ++v) scaled[v] = weight * to_float(pack.value[v]);
  store<T, V>(base, i, scaled);
}

// grad_xs[k][i : i + V] = weights[k] · g and, with kScores, dots[k] += ⟨g, xs[k][i : i + V]⟩
template <typename T, int V, bool kScores>
__device__ void backward_pack(const void* grad_y, const Operands& xs, const float* weights,
                              const Gradients& grad_xs, float* dots, int64_t i, int K) {
  const Pack<T, V> g = load<T, V>(grad_y, i);
  for (int first = 0; first < K; first += kInFlight) {
    const int count = min(kInFlight, K - first);
    Pack<T, V> x[kInFlight];
    if (kScores) {
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (j < count) x[j] = load<T, V>(xs.x[first + j], i);
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (j < count) {
        const int k = first + j;
        if (kScores) dots[k * kBackwardThreads] += dot<T, V>(g, x[j]);
        if (grad_xs.x[k] != nullptr) store_scaled<T, V>(grad_xs.x[k], i, weights[k], g);
      }
    }
  }
}

// Gradients of the operands and, with kScores, this block's share of ⟨g, x_k⟩ in partials [K, gridDim.x].
template <typename T, int V, bool kScores>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    softmax_sum_bwd_kernel(const void* grad_y, const __grid_constant__ Operands xs, const float* scores,
                           const __grid_constant__ Gradients grad_xs, float* partials, int64_t n, int K,
                           bool is_logits) {
  __shared__ float weights[kMaxOperands];
  // [K, kBackwardThreads]: each thread's own sums. K is known at run time only, and registers cannot
  // be indexed; shared memory has the bandwidth to spare.
  extern __shared__ float dots[];
  read_weights(weights, scores, K, is_logits);
  if (kScores) {
#pragma unroll 1
    for (int k = 0; k < K; ++k) dots[k * kBackwardThreads + threadIdx.x] = 0.f;
  }

  const int64_t step = int64_t(gridDim.x) * kBackwardThreads * V;
  int64_t i = (int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x) * V;
  float* own_dots = dots + threadIdx.x;
  for (; i + V <= n; i += step) {
    backward_pack<T, V, kScores>(grad_y, xs, weights, grad_xs, own_dots, i, K);
  }
  for (; i < n; ++i) {
    backward_pack<T, 1, kScores>(grad_y, xs, weights, grad_xs, own_dots, i, K);
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
  read_weights(weights, scores, K, is_logits);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int k = warp; k < K; k += kReduceThreads / kWarp) {
    float sum = 0.f;
#pragma unroll 8
    for (int s = lane; s < splits; s += kWarp) sum += partials[k * splits + s];
    sum = warp_sum(sum);
    if (lane == 0) dots[k] = sum;
  }
  __syncthreads();

  if (threadIdx.x < K) {
    const int k = threadIdx.x;
    float mean = 0.f;
    for (int j = 0; j < K; ++j) mean += weights[j] * dots[j];
    grad_scores[k] = is_logits ? weights[k] * (dots[k] - mean) : dots[k];
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
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

template <typename T, int V>
void launch_forward(const std::vector<Address>& xs, const float* scores, void* y, int64_t n,
                    bool is_logits, cudaStream_t stream) {
  const int64_t blocks = ceil_div(n, int64_t(kForwardThreads) * V);
  softmax_sum_fwd_kernel<T, V><<<blocks, kForwardThreads, 0, stream>>>(pack<Operands>(xs), scores, y, n,
                                                                        xs.size(), is_logits);
  check(cudaGetLastError());
}

template <typename T, int V>
void launch_backward(const void* grad_y, const std::vector<Address>& xs, const float* scores,
                     const std::vector<Address>& grad_xs, float* grad_scores, float* partials, int64_t n,
                     bool is_logits, cudaStream_t stream) {
  const int K = grad_xs.size();
  const int splits = std::min<int64_t>(kMaxSplits, ceil_div(n, int64_t(kBackwardThreads) * V));
  const bool wants_scores = grad_scores != nullptr;
  const auto kernel =
      wants_scores ? softmax_sum_bwd_kernel<T, V, true> : softmax_sum_bwd_kernel<T, V, false>;
  const size_t shared_bytes = wants_scores ? sizeof(float) * K * kBackwardThreads : 0;
  kernel<<<splits, kBackwardThreads, shared_bytes, stream>>>(
      grad_y, pack<Operands>(xs), scores, pack<Gradients>(grad_xs), partials, n, K, is_logits);
  check(cudaGetLastError());
  if (wants_scores) {
    softmax_sum_bwd_reduce_kernel<<<1, kReduceThreads, 0, stream>>>(partials, scores, grad_scores, splits,
                                                                    K, is_logits);
    check(cudaGetLastError());
  }
}

// How many elements of one type a thread moves in one access.
template <typename T_, int V_>
struct Access {
  using T = T_;
  static constexpr int V = V_;
};

template <typename F>
void dispatch(DType dtype, bool wide, F f) {
  switch (dtype) {
    case DType::kFloat32: return wide ? f(Access<float, 4>()) : f(Access<float, 1>());
    case DType::kFloat16: return wide ? f(Access<__half, 8>()) : f(Access<__half, 1>());
    case DType::kBFloat16: return wide ? f(Access<__nv_bfloat16, 8>()) : f(Access<__nv_bfloat16, 1>());
  }
}

}  // namespace

void softmax_sum_forward(const std::vector<Address>& xs, Address scores, Address y, int64_t n, DType dtype,
                         bool is_logits, Address stream) {
  dispatch(dtype, aligned(xs) && aligned({y}), [&](auto access) {
    launch_forward<typename decltype(access)::T, decltype(access)::V>(
        xs, reinterpret_cast<const float*>(scores), reinterpret_cast<void*>(y), n, is_logits,
        reinterpret_cast<cudaStream_t>(stream));
  });
}

void softmax_sum_backward(Address grad_y, const std::vector<Address>& xs, Address scores,
                          const std::vector<Address>& grad_xs, Address grad_scores, Address partials,
                          int64_t n, DType dtype, bool is_logits, Address stream) {
  dispatch(dtype, aligned(xs) && aligned(grad_xs) && aligned({grad_y}), [&](auto access) {
    launch_backward<typename decltype(access)::T, decltype(access)::V>(
        reinterpret_cast<const void*>(grad_y), xs, reinterpret_cast<const float*>(scores), grad_xs,
        reinterpret_cast<float*>(grad_scores), reinterpret_cast<float*>(partials), n, is_logits,
        reinterpret_cast<cudaStream_t>(stream));
  });
}
