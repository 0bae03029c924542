// Launchers of 1x1 convolutions of relu(x) and of their gradients, fp32.
//
// Legend: B pictures of C channels (a multiple of 16) in, O (of 8, at most 64) out, P pixels (of 4) a plane; planes
// are contiguous and 16-byte aligned and only the distance of two pictures varies (`*_batch_stride`, in elements).
// A part is what one block leaves of a sum over all pixels, to be merged in a fixed order by a later launch.
// Addresses travel as integers, as in softmax_sum.h.
#pragma once

#include <cstdint>
#include <vector>

namespace pointwise {

using Address = std::uintptr_t;

struct Shape {
  int batch, C, O, pixels;
  bool exact;  // products of fp32 grade (three TF32 products each) or of TF32 grade
};

constexpr int kMaxJobs = 32;  // of one launch

int forward_parts(const Shape& shape);
int backward_parts(const Shape& shape);

// z = W · relu(x) with W [O, C]; of each part the moments {count, mean, sum of squared deviations} of z [O, 3],
// `moments_stride` floats apart.
struct Job {
  Address x;
  std::int64_t x_batch_stride;
  Address weight, z;
  std::int64_t z_batch_stride;
  Address moments;
  std::int64_t moments_stride;
};
void forward(const Shape& shape, const std::vector<Job>& jobs, Address stream);

// With dz = A · g + B · z + D per channel (coef: float4 {A, B, D, 0} [O]): dx = relu'(x) · Wᵀ · dz, contiguous, and
// partial [parts, O, C], whose sum over the parts is the gradient of W; 0 where they are not wanted.
struct GradJob {
  Address g;
  std::int64_t g_batch_stride;
  Address z;
  std::int64_t z_batch_stride;
  Address coef, x;
  std::int64_t x_batch_stride;
  Address weight, dx, partial;
};
void backward(const Shape& shape, const std::vector<GradJob>& jobs, Address stream);

}  // namespace pointwise
