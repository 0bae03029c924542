// Launchers of 1x1 and 3x3 convolutions of relu(x), stride 1, zeros around the picture, and of their gradients.
//
// Legend: B pictures of C channels (16, 32 or 64), in and out, and H x W pixels, W a multiple of 4; planes are
// contiguous and 16-byte aligned and only the distance of two pictures varies (`*_batch_stride`, in elements).
// Pictures (x, z, g, dx) are fp32 or, where a shape says `bf16`, bf16; all else is fp32.
// All convolutions of a launch have one input. A part is what one block leaves of a sum over all pixels, to be merged
// in a fixed order by a later launch. Addresses travel as integers, as in softmax_sum.h. `mixing`: see drawn.cuh.
#pragma once

#include <cstdint>
#include <vector>

namespace dense_conv {

using Address = std::uintptr_t;

struct Shape {
  int batch, channels, height, width;
  bool bf16;
  bool exact;  // products of fp32 grade (three TF32 products each) or of TF32 grade, as they always are with bf16
};

struct Input {
  Address x;
  std::int64_t batch_stride;
};

constexpr int kMaxJobs = 32;  // of one launch

int forward_parts(const Shape& shape);
int backward_parts(const Shape& shape);
int dx_splits(const Shape& shape, int jobs);

// z = W ⋆ relu(x) with W [C, C, kernel_size, kernel_size]; moments [forward_parts, C] of {count, mean, sum of squared
// deviations} of z.
struct Job {
  Address weight, z, moments, mixing;
  int kernel_size;
};
void forward(const Shape& shape, const Input& input, const std::vector<Job>& jobs, Address stream);

// dz = A · g + B · z + D per channel (coef: float4 {A, B, D, 0} [C]).
struct GradJob {
  Address g;
  std::int64_t g_batch_stride;
  Address z, coef, weight, partial, mixing;
  int kernel_size;
};
// dx [splits, B, C, H, W], whose sum over the splits is relu'(x) · Σ Wᵀ ⋆ dz.
void input_gradient(const Shape& shape, const Input& input, const std::vector<GradJob>& jobs, int splits, Address dx,
                    Address stream);
// partial [backward_parts, C, C, kernel_size, kernel_size], whose sum over the parts is the gradient of W.
void weight_gradients(const Shape& shape, const Input& input, const std::vector<GradJob>& jobs, Address stream);

}  // namespace dense_conv
