// Launchers of 1x1 convolutions of relu(x) and of their gradients.
//
// Legend: B pictures of C channels (a multiple of 16) and H x W pixels in, O channels (of 8, at most 64) out. At stride
// 2 they read the pixels (2i + corner, 2j + corner) of every picture, zeros past its last row, for both corners, 0 and
// 1; W is a multiple of 8 then, and at stride 1 H · W one of 4. Planes are contiguous and 16-byte aligned and only the
// distance of two pictures varies (`*_batch_stride`, in elements).
// Pictures (x, z, g, dx) are fp32 or, where a shape says `bf16`, bf16; all else is fp32.
// A part is what one block leaves of a sum over all pixels, to be merged in a fixed order by a later launch.
// Addresses travel as integers, as in softmax_sum.h.
#pragma once

#include <cstdint>
#include <vector>

namespace pointwise {

using Address = std::uintptr_t;

struct Shape {
  int batch, C, O, height, width, stride;
  bool bf16;
  bool exact;  // products of fp32 grade (three TF32 products each) or of TF32 grade, as they always are with bf16
};

constexpr int kMaxJobs = 32;     // of one launch
constexpr int kMaxTargets = 16;  // of one launch

int forward_parts(const Shape& shape);
int backward_parts(const Shape& shape);

// z = W · relu(x) with W [O, C]; of each part the moments {count, mean, sum of squared deviations} of z [O, 3],
// `moments_stride` floats apart.
struct Job {
  Address x;
  std::int64_t x_batch_stride;
  int corner;
  Address weight, z;
  std::int64_t z_batch_stride;
  Address moments;
  std::int64_t moments_stride;
};
void forward(const Shape& shape, const std::vector<Job>& jobs, Address stream);

// With dz = A · g + B · z + D per channel (coef: float4 {A, B, D, 0} [O]) the gradient of x by all of `sources`,
// Σ relu'(x) · Wᵀ · dz; and of each partial [parts, O, C], whose sum over the parts is the gradient of W. Both are 0
// where they are not wanted. dx is contiguous; that of a corner fills every second row, with zeros beside its pixels.
struct Source {
  Address g;
  std::int64_t g_batch_stride;
  Address z;
  std::int64_t z_batch_stride;
  Address coef, weight, partial;
};
struct Target {
  Address x;
  std::int64_t x_batch_stride;
  int corner;
  Address dx;
  std::vector<Source> sources;
};
void backward(const Shape& shape, const std::vector<Target>& targets, Address stream);

}  // namespace pointwise
