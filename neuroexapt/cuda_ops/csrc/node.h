// Launchers of what a fused search cell does besides its convolutions: pools, BatchNorm statistics, the sum that makes
// a node, and their gradients.
//
// Legend: B pictures of C channels; a tensor's planes are contiguous and only the distance of two pictures varies
// (in elements). Pictures are fp32 or, where a shape says `bf16`, bf16; all else is fp32. `stats` (float2 [C]): mean
// and 1 / sqrt(variance + eps) of a BatchNorm. `moments` [parts, C] of {count, mean, sum of squared deviations}: each
// of the parts of a sum over all pictures leaves its own, and a later launch merges them in a fixed order. Addresses
// travel as integers, 0 for what is absent, as in softmax_sum.h. `early`: while the kernel before still runs
// (launch.cuh). `mixing`: see drawn.cuh; with `drawn_only` terms of weight 0 are not read.
#pragma once

#include <cstdint>
#include <vector>

namespace node {

using Address = std::uintptr_t;

struct Tensor {
  Address data = 0;
  std::int64_t batch_stride = 0;
};

struct Shape {
  int batch, channels, pixels;  // of a plane
  bool bf16;
};

constexpr int kMaxTerms = 96;    // of a node
constexpr int kMaxEdges = 16;    // that leave a state
constexpr int kMaxAddends = 64;  // of a state's gradient

int parts(const Shape& shape);  // of every sum over pictures

struct MomentsJob {
  Tensor z;
  Address moments;
};
void plane_moments(const Shape& shape, const std::vector<MomentsJob>& jobs, Address stream);

// `stats` from the moments, which also enter the running statistics as PyTorch's BatchNorm does it, or where
// moments is 0 from the running statistics. Those of a candidate that does not run stay as they are.
struct StatsJob {
  Address moments;
  int parts;
  Address stats, running_mean, running_var, num_batches_tracked, mixing;
};
void finalize(int channels, float eps, float momentum, const std::vector<StatsJob>& jobs, bool early, Address stream);

// Windows of kernel_size (3) pixels square, padded by half of it, stride 1 or 2.
struct PoolShape {
  int batch, channels, height, width, out_height, out_width, kernel_size, stride;
  bool bf16;
};
int pool_parts(const PoolShape& shape);

// Maxima and averages (over the pixels inside the picture) of every window, contiguous, and their moments, if one of
// `mixing` runs or there are none; all jobs have some or none has.
struct PoolJob {
  Tensor x;
  Address max, max_moments, avg, avg_moments;
  std::vector<Address> mixing;
};
void pool(const PoolShape& shape, const std::vector<PoolJob>& jobs, Address stream);

// A summand of a node: weight · (z − mean) · rstd, or weight · z where stats is 0; weight 0 stands for 1.
struct Term {
  Tensor z;
  Address stats, weight;
};
void sum(const Shape& shape, const std::vector<Term>& terms, bool drawn_only, Tensor y, Address stream);

// dots [rows, C, parts]: Σ g in the first row, and for every term Σ g · (z − mean) in its own. `entry`: where its
// mixing weight stands, −1 for a term that is always read.
struct DotTerm {
  Tensor z;
  Address stats;
  int row, entry;
};
// Terms that are the maxima and the averages, or one of them (the other's row is 0), of windows of x, which are
// formed here once more. Kernel size 3, stride 1 or 2; height and width are x's own.
struct PooledTerms {
  Tensor x;
  int height, width, stride;
  Address max_stats, avg_stats;
  std::int16_t max_row, avg_row, max_entry, avg_entry;
};
// `width`: of g's pictures; `mixing`: of all entries, 0 where all terms are read.
void dots(const Shape& shape, int width, const std::vector<DotTerm>& terms, const std::vector<PooledTerms>& pools,
          Address mixing, Tensor g, Address dots, Address stream);

// From dots the gradient of every weight and coef (float4 {A, B, D, 0} [C]) with dz = A · g + B · z + D; in
// evaluation mode the statistics are constants. With `drawn_only` in the place of a term of weight 0, which is not read,
// stands the constant 1: the gradient of its weight is Σ g and coef is 0. The terms are in the order of their rows;
// after them may come some without coef, that are 0 where they are drawn: their weights' gradients are left as they
// were then.
struct TermGradient {
  Address stats, weight, grad_weight, coef;
};
void coefficients(const Shape& shape, bool training, const std::vector<TermGradient>& terms, bool drawn_only,
                  Address dots, bool early, Address stream);

// dz = A · g + B · z + D.
struct AffineJob {
  Tensor g, z;
  Address coef, dz;
};
void affine_gradient(const Shape& shape, const std::vector<AffineJob>& jobs, Address stream);

// dx = Σ addends + Σ_edges identity_weight · g, plus the gradients of the two pools, each of which is transposed
// once: that of the maxima is Σ_edges A · g + B · max + D with the edge's max_coef, likewise the averages'.
struct StateEdge {
  Tensor g;
  Address max_coef, avg_coef, identity_weight;
};
struct StateJob {
  Tensor x;
  std::vector<StateEdge> edges;
  std::vector<Tensor> addends;
  Address dx;
  bool means_only;  // pools are averages without statistics: their coefs hold A alone
};
void state_gradients(const PoolShape& shape, const std::vector<StateJob>& jobs, bool drawn_only, Address stream);

}  // namespace node
