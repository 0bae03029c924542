// Launchers of the convolution stages of a fused search cell, stride 1.
//
// A stage runs many separable convolutions (relu or normalise + relu, depthwise K x K of dilation D, pointwise)
// in one launch. Legend: B pictures of C channels and H x W pixels; a tensor's planes are contiguous and only
// the distance of two pictures varies (`*_batch_stride`, in elements). Pictures (x, z, g, dx) are fp32 or, where a
// shape says `bf16`, bf16; all else is fp32. A part is one tile of one picture: every sum over pictures is left as one
// partial sum a part, merged in a fixed order by a later launch. Addresses travel as integers, as in softmax_sum.h.
// `mixing`: see drawn.cuh; all jobs of a launch have one or none has.
#pragma once

#include <cstdint>
#include <vector>

namespace cell_conv {

using Address = std::uintptr_t;

struct Shape {
  int batch, channels, height, width;  // channels: 16, 32 or 64
  bool bf16;
  bool exact;  // products of fp32 grade (three TF32 products each) or of TF32 grade, as they always are with bf16
};

int forward_parts(const Shape& shape);
int backward_parts(const Shape& shape);

// z = W_pw · (W_dw ⋆ relu(x)), or of relu((x − mean) · rstd) where stats (float2 [C]) is given;
// moments [parts, C] of {count, mean, sum of squared deviations} of z.
struct Job {
  Address x;
  std::int64_t x_batch_stride;
  Address stats, depthwise, pointwise, z, moments, mixing;
  int kernel_size, dilation;
};

void forward(const Shape& shape, const std::vector<Job>& jobs, Address stream);

// With dz = A · g + B · z + D per channel (coef: float4 {A, B, D, 0} [C]) and e = W_pwᵀ · dz:
// dx = relu'(x) · (W_dwᵀ ⋆ e); partial weight gradients depthwise_partial [parts, C, K²] and
// pointwise_partial [parts, C, C], or 0 where they are not wanted.
struct GradJob {
  Address g;
  std::int64_t g_batch_stride;
  Address z, coef, x;
  std::int64_t x_batch_stride;
  Address stats, depthwise, pointwise, dx, sums, depthwise_partial, pointwise_partial, mixing;
  int kernel_size, dilation;
};

// Convolutions of normalised inputs: dx is the gradient of (x − mean) · rstd, sums [parts, C] of
// {Σ dx, Σ dx · (x − mean)}.
void backward_second(const Shape& shape, const std::vector<GradJob>& jobs, Address stream);

// Convolutions of up to four states: jobs of one state have the same x and the same dx, [splits, B, C, H, W], whose
// sum over the first dimension is the gradient. dx_splits: how many of them occupy the device, `jobs` of one state.
int dx_splits(const Shape& shape, int jobs, int states, bool wants_weights);
void backward_first(const Shape& shape, const std::vector<GradJob>& jobs, int splits, Address stream);

// From `sums` the coef of the BatchNorm between the two halves of a separable convolution; in evaluation mode
// its statistics are constants.
struct CoefJob {
  Address sums, stats, coef;
};
void first_coefficients(const Shape& shape, bool training, const std::vector<CoefJob>& jobs, Address stream);

}  // namespace cell_conv
