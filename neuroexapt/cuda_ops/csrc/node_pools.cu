// Pools and the gradient of a state; node.h has the legend.

#include "drawn.cuh"
#include "node_windows.cuh"

namespace node {
namespace {

constexpr int kMaxPools = 8, kMaxStates = 2;  // of a launch
constexpr int kStateThreads = 256;
constexpr int kTilePixels = 1024;
constexpr int kPoolSpan = 256;  // pixels of a part: fewer than elsewhere, since a window is many loads
constexpr int kAtOnce = 4;  // edges or addends whose loads a thread issues before it uses the first

struct Pools {
  Tensor x;
  Address max, max_moments, avg, avg_moments;
  int candidates;  // that decide whether they are wanted
  Address mixing[2 * kMaxEdges];

  __device__ bool run() const {
    bool any = false;
    for (int i = 0; i < candidates; ++i) any |= drawn::runs(mixing[i]);
    return any;
  }
};

struct PoolLaunch {
  PoolShape shape;
  Divisor per_plane, width;  // of the output; the first in what a thread takes at once
  Pools jobs[kMaxPools];
};

// Grid: (parts / kWarps, channels, jobs).
template <typename T, int K, int S, int V, bool kDrawnOnly>
__global__ void __launch_bounds__(kThreads, 5) pool_kernel(const __grid_constant__ PoolLaunch launch) {
  launching::let_next_begin();
  const PoolShape& shape = launch.shape;
  const Pools& job = launch.jobs[blockIdx.z];
  if (kDrawnOnly && !job.run()) return;
  const Shape out = output_shape(shape);
  const int part = blockIdx.x * kWarps + threadIdx.x / kWarp, channel = blockIdx.y;
  if (part >= part_count(out, kPoolSpan)) return;
  using PoolShare = Share<V, kPoolSpan>;
  const PoolShare share(part, out, launch.per_plane);
  Values<V> max[PoolShare::kSlots], avg[PoolShare::kSlots];
#pragma unroll
  for (int slot = 0; slot < PoolShare::kSlots; ++slot) {
    const Position at = share.at[slot];
    const T* plane = pointer<const T>(job.x.data) + at.picture * job.x.batch_stride +
                     int64_t(channel) * shape.height * shape.width;
    const int row = launch.width.divide(at.pixel);
    const Windows<K, S, V> windows(plane, row, at.pixel - row * shape.out_width, shape);
#pragma unroll
    for (int v = 0; v < V; ++v) max[slot].v[v] = windows.max[v], avg[slot].v[v] = windows.avg[v];
    if (slot >= share.count) continue;
    if (job.max != 0) max[slot].store(at.in_contiguous<T>(job.max, channel, out));
    if (job.avg != 0) avg[slot].store(at.in_contiguous<T>(job.avg, channel, out));
  }
  const int64_t moments = (int64_t(part) * out.channels + channel) * 3;
  if (job.max_moments != 0) store_moments(pointer<float>(job.max_moments) + moments, max, share.count);
  if (job.avg_moments != 0) store_moments(pointer<float>(job.avg_moments) + moments, avg, share.count);
}

struct State {
  Tensor x;
  Address dx;
  int edges, addends;
  bool max, avg, identities;  // whether there are such
  StateEdge edge[kMaxEdges];
  Tensor addend[kMaxAddends];
};

// The planes and rows of a block: several whole planes where they are small, else a band of one.
template <int K, int S>
struct Tile {
  int planes, rows;

  __host__ __device__ Tile(const PoolShape& shape)
      : planes(min(shape.channels, max(1, kTilePixels / (shape.height * shape.width)))),
        rows(planes > 1 ? shape.height : min(shape.height, max(1, kTilePixels / shape.width))) {}

  __host__ __device__ int bands(const PoolShape& shape) const { return ceil_div(shape.height, rows); }

  // Rows of windows that reach into `rows` rows.
  __host__ __device__ int window_rows(const PoolShape& shape) const {
    return min(shape.out_height, (rows + K - 2) / S + 1);
  }
};

// A tile for the kernel, with what divides a block's or a thread's number: divisions would be a quarter of the
// kernel's instructions, and every load waits for them.
struct TileOfLaunch {
  int planes, rows, window_rows;
  Divisor bands, channels, per_row, per_window_row, by_rows, by_window_rows;

  template <int K, int S>
  TileOfLaunch(const Tile<K, S>& tile, const PoolShape& shape, int pixels_at_once, int windows_at_once)
      : planes(tile.planes),
        rows(tile.rows),
        window_rows(tile.window_rows(shape)),
        bands(tile.bands(shape)),
        channels(shape.channels),
        per_row(shape.width / pixels_at_once),
        per_window_row(shape.out_width / windows_at_once),
        by_rows(rows),
        by_window_rows(window_rows) {}
};

struct StateLaunch {
  PoolShape shape;
  TileOfLaunch tile;
  State states[kMaxStates];
};

// What the windows pass back, in shared memory: rows of them, in each of which four columns precede the first
// window and at least one follows the last; of these the nearest are zeros.
struct WindowGradients {
  static constexpr int kLeft = 4, kNowhere = 255;
  int pitch;
  float *max, *avg;  // avg is already shared out to the window's pixels
  unsigned char* first_maximum;

  __device__ WindowGradients(float* shared, int rows, int width)
      : pitch(pitch_of(width)),
        max(shared),
        avg(max + rows * pitch),
        first_maximum(reinterpret_cast<unsigned char*>(avg + rows * pitch)) {}

  __device__ int column(int row, int x) const { return row * pitch + kLeft + x; }

  __device__ void clear(int i) const { max[i] = avg[i] = 0.f, first_maximum[i] = kNowhere; }

  __host__ __device__ static int pitch_of(int width) { return kLeft + ceil_div(width + 1, 4) * 4; }
  static int bytes(int rows, int width) { return rows * pitch_of(width) * (2 * sizeof(float) + 1); }
};

// What a block reads of every edge, in shared memory.
struct EdgeMemory {
  float4* coefs;   // of maxima and of averages, of every edge, of every plane; zeros where there is no such pool
  float* weights;  // of identities, likewise

  static int bytes(int planes, int edges) { return planes * edges * 2 * sizeof(float4) + kMaxEdges * sizeof(float); }

  __device__ EdgeMemory(float* shared, int planes, int edges)
      : coefs(reinterpret_cast<float4*>(shared)),
        weights(reinterpret_cast<float*>(coefs + planes * edges * 2)) {}

  __device__ float* end() const { return weights + kMaxEdges; }

  // Whether any pool passes something back, as far as this thread has seen.
  __device__ bool load(const State& state, int first_plane, int planes, const Divisor& channels) const {
    bool any = false;
    if (threadIdx.x < state.edges) {
      const Address weight = state.edge[threadIdx.x].identity_weight;
      weights[threadIdx.x] = weight == 0 ? 0.f : weight_of(weight);
    }
    constexpr int kPerPlane = 2 * kMaxEdges;
#pragma unroll 1
    for (int i = threadIdx.x; i < planes * kPerPlane; i += kStateThreads) {
      const int plane = i / kPerPlane, number = i % kPerPlane;
      if (number >= state.edges * 2) continue;
      const StateEdge& edge = state.edge[number / 2];
      const Address coef = number % 2 == 0 ? edge.max_coef : edge.avg_coef;
      const int channel = channels.remainder(first_plane + plane);
      const float4 c = coef == 0 ? make_float4(0.f, 0.f, 0.f, 0.f) : __ldg(pointer<const float4>(coef) + channel);
      coefs[plane * state.edges * 2 + number] = c;
      any |= passes(c);
    }
    return any;
  }

  static __device__ bool passes(const float4& coef) { return coef.x != 0.f || coef.y != 0.f || coef.z != 0.f; }
};

// gradient += A · g + B · pooled + D for V windows.
template <int V>
__device__ void add_gradient(float (&gradient)[V], const Values<V>& g, const float4& coef,
                             const float (&pooled)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    gradient[v] = fmaf(coef.x, g.v[v], gradient[v] + fmaf(coef.y, pooled[v], coef.z));
  }
}

// dx += what the windows of a row pass back to the pixels x, x + 1, … of a row that is their row ky.
template <int K, int S, bool kMeansOnly, int V>
__device__ void gather_row(Values<V>& dx, const WindowGradients& windows, int row, int ky, int x) {
  constexpr int kRadius = K / 2;
  const auto add = [&](int v, float max, float avg, int first_maximum, int kx) {
    dx.v[v] += avg;
    if (!kMeansOnly && first_maximum == ky * K + kx) dx.v[v] += max;
  };
  if constexpr (V % S == 0) {  // x is a multiple of S, so it is known which windows hold a pixel
    constexpr int kFirst = -(K - 1 - kRadius) / S, kCount = (V - 1 + kRadius) / S - kFirst + 1;
    const int start = windows.column(row, x / S + kFirst);
    float max[kCount], avg[kCount];
    int first_maximum[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      avg[i] = windows.avg[start + i];
      max[i] = kMeansOnly ? 0.f : windows.max[start + i];
      first_maximum[i] = kMeansOnly ? 0 : windows.first_maximum[start + i];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        if ((v + kRadius - kx) % S != 0) continue;
        const int i = (v + kRadius - kx) / S - kFirst;
        add(v, max[i], avg[i], first_maximum[i], kx);
      }
    }
  } else {
#pragma unroll
    for (int kx = 0; kx < K; ++kx) {
      const int window_x = x + kRadius - kx;  // times S
      if (window_x % S != 0) continue;
      const int i = windows.column(row, window_x / S);
      add(0, windows.max[i], windows.avg[i], windows.first_maximum[i], kx);
    }
  }
}

// Grid: (planes / Tile::planes times bands, states). Phase one leaves the gradients of windows, W of them a thread, in
// shared memory; phase two gathers for every pixel of x, V of them a thread, those of the windows that hold it. With
// kDrawnOnly nothing is read for what passes nothing back. With kMeansOnly all pools are averages without statistics,
// for whose gradients x does not matter.
template <typename T, int K, int S, int W, int V, bool kDrawnOnly, bool kMeansOnly>
__global__ void __launch_bounds__(kStateThreads, 3) state_kernel(const __grid_constant__ StateLaunch launch) {
  launching::let_next_begin();
  extern __shared__ __align__(16) float shared[];
  constexpr int kRadius = K / 2;
  const PoolShape& shape = launch.shape;
  const State& state = launch.states[blockIdx.y];
  const TileOfLaunch& tile = launch.tile;
  const int group = tile.bands.divide(blockIdx.x), first_plane = group * tile.planes;
  const int planes = min(tile.planes, shape.batch * shape.channels - first_plane);
  const int top = tile.bands.remainder(blockIdx.x) * tile.rows, bottom = min(shape.height, top + tile.rows);
  // The windows that reach into rows [top, bottom).
  const int first_window = max(0, (top - kRadius + S - 1) / S);
  const int window_rows = min(shape.out_height, (bottom - 1 + kRadius) / S + 1) - first_window;
  const int out_plane = shape.out_height * shape.out_width, plane_pixels = shape.height * shape.width;
  const EdgeMemory edges(shared, tile.planes, state.edges);
  const WindowGradients windows(edges.end(), tile.planes * tile.window_rows, shape.out_width);
  bool has_pools = state.max || state.avg;
  const bool pools_pass = edges.load(state, first_plane, planes, tile.channels);
  if constexpr (kDrawnOnly) has_pools = __syncthreads_or(pools_pass);
  else __syncthreads();

  if (has_pools) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * planes * tile.window_rows; i += kStateThreads) {
      windows.clear(windows.column(i / 2, i % 2 == 0 ? -1 : shape.out_width));
    }
    const int across = tile.per_window_row.divisor;
    for (int i = threadIdx.x; i < planes * tile.window_rows * across; i += kStateThreads) {
      const int row = tile.per_window_row.divide(i), x = (i - row * across) * W;
      const int in_block = tile.by_window_rows.divide(row), below = row - in_block * tile.window_rows;
      if (below >= window_rows) continue;
      const int plane = first_plane + in_block, y = first_window + below;
      const int picture = tile.channels.divide(plane), channel = plane - picture * shape.channels;
      using Pooled = std::conditional_t<kMeansOnly, Shares<K, S, W>, Windows<K, S, W>>;
      const Pooled pooled(
          pointer<const T>(state.x.data) + picture * state.x.batch_stride + channel * plane_pixels, y, x, shape);
      const int target = windows.column(row, x);
      if constexpr (!kMeansOnly) {
#pragma unroll
        for (int v = 0; v < W; ++v) windows.first_maximum[target + v] = pooled.first_maximum(v);
      }
      float max_gradient[W] = {}, avg_gradient[W] = {};
      const int window = channel * out_plane + y * shape.out_width + x;
      const float4* coefs = edges.coefs + in_block * state.edges * 2;
#pragma unroll 1
      for (int first = 0; first < state.edges; first += kAtOnce) {
        Values<W> g[kAtOnce];
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          const int edge = min(first + e, state.edges - 1);
          if (kDrawnOnly && !edges.passes(coefs[2 * edge]) && !edges.passes(coefs[2 * edge + 1])) {
            g[e] = {};
            continue;
          }
          const Tensor& source = state.edge[edge].g;
          g[e] = Values<W>::load(pointer<const T>(source.data) + picture * source.batch_stride + window);
        }
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          if (first + e >= state.edges) continue;
          const float4 *of_max = coefs + 2 * (first + e), *of_avg = of_max + 1;
          if constexpr (kMeansOnly) {
#pragma unroll
            for (int v = 0; v < W; ++v) avg_gradient[v] = fmaf(of_avg->x, g[e].v[v], avg_gradient[v]);
          } else {
            add_gradient(max_gradient, g[e], *of_max, pooled.max);
            add_gradient(avg_gradient, g[e], *of_avg, pooled.avg);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < W; ++v) {
        windows.avg[target + v] = avg_gradient[v] * pooled.share[v];
        if constexpr (!kMeansOnly) windows.max[target + v] = max_gradient[v];
      }
    }
    __syncthreads();
  }

  const int across = tile.per_row.divisor;
  for (int i = threadIdx.x; i < planes * tile.rows * across; i += kStateThreads) {
    const int row = tile.per_row.divide(i), x = (i - row * across) * V;
    const int in_block = tile.by_rows.divide(row), y = top + row - in_block * tile.rows;
    if (y >= bottom) continue;
    const int plane = first_plane + in_block;
    const int picture = tile.channels.divide(plane), channel = plane - picture * shape.channels;
    const int pixel = channel * plane_pixels + y * shape.width + x;
    Values<V> dx = {};
    const auto load = [&](const Tensor& tensor) {
      return Values<V>::load(pointer<const T>(tensor.data) + picture * tensor.batch_stride + pixel);
    };
    const auto add = [&](const Values<V>& values, float weight) {
#pragma unroll
      for (int v = 0; v < V; ++v) dx.v[v] = fmaf(weight, values.v[v], dx.v[v]);
    };
    for (int first = 0; first < state.addends; first += kAtOnce) {
      Values<V> addends[kAtOnce];
#pragma unroll
      for (int a = 0; a < kAtOnce; ++a) addends[a] = load(state.addend[min(first + a, state.addends - 1)]);
#pragma unroll
      for (int a = 0; a < kAtOnce; ++a) {
        if (first + a < state.addends) add(addends[a], 1.f);
      }
    }
    for (int first = 0; state.identities && first < state.edges; first += kAtOnce) {
      Values<V> g[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const int edge = min(first + e, state.edges - 1);
        if (kDrawnOnly && edges.weights[edge] == 0.f) g[e] = {};
        else g[e] = load(state.edge[edge].g);
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (first + e < state.edges) add(g[e], edges.weights[first + e]);
      }
    }
    if (has_pools) {
      const int window_plane = in_block * tile.window_rows - first_window;
#pragma unroll
      for (int ky = 0; ky < K; ++ky) {
        const int window_y = y + kRadius - ky;  // times S
        if (window_y < 0 || window_y % S != 0 || window_y / S >= shape.out_height) continue;
        gather_row<K, S, kMeansOnly>(dx, windows, window_plane + window_y / S, ky, x);
      }
    }
    dx.store(pointer<T>(state.dx) + int64_t(picture) * shape.channels * plane_pixels + pixel);
  }
}

// Calls f with the Type that pictures are stored as, window size and stride, and how many windows a thread takes, which
// are one or those of a row's four pixels.
template <typename F>
void with_windows(const PoolShape& shape, bool is_wide, F f) {
  const auto with_width = [&](auto size, auto stride) {
    with_storage(shape.bf16, [&](auto storage) {
      if (is_wide && shape.width % 4 == 0) f(storage, size, stride, std::integral_constant<int, 4 / stride()>());
      else f(storage, size, stride, std::integral_constant<int, 1>());
    });
  };
  const auto with_stride = [&](auto size) {
    if (shape.stride == 2) with_width(size, std::integral_constant<int, 2>());
    else with_width(size, std::integral_constant<int, 1>());
  };
  if (shape.stride != 1 && shape.stride != 2) throw std::invalid_argument("pools take stride 1 or 2");
  if (shape.kernel_size != kPoolSize) throw std::invalid_argument("pools take windows of 3 pixels");
  with_stride(std::integral_constant<int, kPoolSize>());
}

State state_of(const StateJob& job) {
  State state{job.x, job.dx, int(job.edges.size()), int(job.addends.size())};
  copy_into(state.edge, job.edges, "too many edges leave one state");
  copy_into(state.addend, job.addends, "too many addends in one state's gradient");
  for (const StateEdge& edge : job.edges) {
    state.max |= edge.max_coef != 0;
    state.avg |= edge.avg_coef != 0;
    state.identities |= edge.identity_weight != 0;
  }
  return state;
}

Pools pools_of(const PoolJob& job) {
  Pools pools{job.x, job.max, job.max_moments, job.avg, job.avg_moments, int(job.mixing.size()), {}};
  copy_into(pools.mixing, job.mixing, "too many pools leave one state");
  return pools;
}

bool is_wide(const StateJob& job) {
  return wide(job.x) && all_wide(job.edges, [](const StateEdge& edge) { return edge.g; }) &&
         all_wide(job.addends, [](const Tensor& addend) { return addend; });
}

bool is_wide(const PoolJob& job) { return wide(job.x) && wide(job.max) && wide(job.avg); }

template <typename Jobs>
bool are_wide(const Jobs& jobs) {
  return std::all_of(jobs.begin(), jobs.end(), [](const auto& job) { return is_wide(job); });
}

}  // namespace

int pool_parts(const PoolShape& shape) { return part_count(output_shape(shape), kPoolSpan); }

void pool(const PoolShape& shape, const std::vector<PoolJob>& jobs, Address stream) {
  with_windows(shape, are_wide(jobs), [&](auto storage, auto K, auto S, auto V) {
    using T = typename decltype(storage)::type;
    const int plane = shape.out_height * shape.out_width;
    const bool drawn_only = !jobs[0].mixing.empty();
    const auto kernel = drawn_only ? pool_kernel<T, K(), S(), V(), true> : pool_kernel<T, K(), S(), V(), false>;
    PoolLaunch parameters{shape, Divisor(plane / V()), Divisor(shape.out_width), {}};
    in_batches(jobs, kMaxPools, [&](size_t first, size_t count) {
      std::transform(jobs.begin() + first, jobs.begin() + first + count, parameters.jobs, pools_of);
      launch(kernel, dim3(ceil_div(pool_parts(shape), kWarps), shape.channels, count),
             kThreads, 0, stream, parameters);
    });
  });
}

void state_gradients(const PoolShape& shape, const std::vector<StateJob>& jobs, bool drawn_only, Address stream) {
  with_windows(shape, are_wide(jobs), [&](auto storage, auto K, auto S, auto W) {
    using T = typename decltype(storage)::type;
    constexpr int V = W() == 1 ? 1 : 4;
    const Tile<K(), S()> tile(shape);
    StateLaunch parameters{shape, TileOfLaunch(tile, shape, V, W()), {}};
    in_batches(jobs, kMaxStates, [&](size_t first, size_t count) {
      std::transform(jobs.begin() + first, jobs.begin() + first + count, parameters.states, state_of);
      State* end = parameters.states + count;
      const bool has_pools =
          std::any_of(parameters.states, end, [](const State& state) { return state.max || state.avg; });
      const int edges = std::max_element(parameters.states, end, [](const State& a, const State& b) {
                          return a.edges < b.edges;
                        })->edges;
      const int groups = ceil_div(shape.batch * shape.channels, tile.planes);
      const int window_rows = has_pools ? tile.planes * tile.window_rows(shape) : 0;
      const int bytes = EdgeMemory::bytes(tile.planes, edges) + WindowGradients::bytes(window_rows, shape.out_width);
      const bool means_only = std::all_of(jobs.begin() + first, jobs.begin() + first + count,
                                          [](const StateJob& job) { return job.means_only; });
      const auto launch_it = [&](auto drawn, auto means) {
        launch(state_kernel<T, K(), S(), W(), V, drawn(), means()>, dim3(groups * tile.bands(shape), count),
               kStateThreads, bytes, stream, parameters);
      };
      const auto with_drawn = [&](auto means) {
        drawn_only ? launch_it(std::true_type(), means) : launch_it(std::false_type(), means);
      };
      means_only ? with_drawn(std::true_type()) : with_drawn(std::false_type());
    });
  });
}

}  // namespace node
