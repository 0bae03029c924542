// Launchers of the convolution stages of a reduction cell: stride 2.
//
// Legend: as in cell_conv.h, for states x of B pictures of C channels and H x W pixels (W a multiple of 8) with
// 16-byte aligned planes; what they leave has ceil(H / 2) x W / 2 pixels.
#pragma once

#include <cstdint>
#include <vector>

namespace cell_strided {

using Address = std::uintptr_t;

struct Shape {
  int batch, channels, height, width;  // channels: 16, 32 or 64
  bool bf16;
  bool exact;  // products of fp32 grade (three TF32 products each) or of TF32 grade, as they always are with bf16
};

int forward_parts(const Shape& shape);

// z = W_pw · (W_dw ⋆ relu(x)), contiguous; moments [parts, C] of {count, mean, sum of squared deviations} of z.
struct Job {
  Address x;
  std::int64_t x_batch_stride;
  Address depthwise, pointwise, z, moments, mixing;
  int kernel_size, dilation;
};
void forward(const Shape& shape, const std::vector<Job>& jobs, Address stream);

// As in cell_conv.h; for pictures of at most 16 output columns, of 8 at 64 channels (`backward_takes`). Every block
// computes all convolutions of a state for its pixels and 16 channels, so dx, contiguous, is complete.
struct GradJob {
  Address g;
  std::int64_t g_batch_stride;
  Address z, coef, depthwise, pointwise, depthwise_partial, pointwise_partial, mixing;
  int kernel_size, dilation;
};
struct StateGrad {
  Address x;
  std::int64_t x_batch_stride;
  Address dx;
  std::vector<GradJob> jobs;
};
bool backward_takes(const Shape& shape);
int backward_parts(const Shape& shape);
void backward(const Shape& shape, const std::vector<StateGrad>& states, Address stream);

}  // namespace cell_strided
