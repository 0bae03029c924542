// Launchers of the separable convolution relu → depthwise → pointwise in fp32, and of its gradients.
//
// Legend: batch pictures x [C, H, W] in, y [O, OH, OW] out, all contiguous and 16-byte aligned; kernel
// size K, stride S, dilation D, padding D · (K / 2). A tile is `rows` whole output rows of one picture.
// Addresses travel as integers, as in softmax_sum.h.
#pragma once

#include <cstdint>
#include <vector>

namespace sepconv {

using Address = std::uintptr_t;

struct Shape {
  int batch, C, O, H, W, OH, OW, K, stride, dilation;
  bool relu;
};

constexpr int kMaxJobs = 32;  // of one launch

// Needs K of 3 or 5; C and O divisible by 16, W by 4 · stride, and OH by rows.
struct Job {
  Address x, depthwise, pointwise, y;
  std::int64_t y_batch_stride;
};
void forward(const Shape& shape, const std::vector<Job>& jobs, int rows, int shared_bytes, Address stream);

// The gradient of y is A · g + B · z + D with coef (float4 {A, B, D, 0} [O]), or g itself where coef is 0. Only of y,
// g and z the pictures may lie apart. The address of a result is 0 where it is not wanted; all jobs want the same ones.
// Partial sums, one a tile: pointwise_partial [tiles, O, C], depthwise_partial [tiles, C, K²]; the gradients of the
// weights are added up from them, unless only the partial sums are wanted.
struct GradJob {
  Address g;
  std::int64_t g_batch_stride;
  Address z;
  std::int64_t z_batch_stride;
  Address coef, x, depthwise, pointwise;
  Address dx, depthwise_grad, pointwise_grad, depthwise_partial, pointwise_partial;
};
void backward(const Shape& shape, const std::vector<GradJob>& jobs, int rows, int shared_bytes, Address stream);

}  // namespace sepconv
