// Launchers of the separable convolution relu → depthwise → pointwise in fp32, and of its gradients.
//
// Legend: batch pictures x [C, H, W] in, y [O, OH, OW] out, all contiguous and 16-byte aligned; kernel
// size K, stride S, dilation D, padding D · (K / 2). A tile is `rows` whole output rows of one picture.
// Addresses travel as integers, as in softmax_sum.h.
#pragma once

#include <cstdint>

namespace sepconv {

using Address = std::uintptr_t;

struct Shape {
  int batch, C, O, H, W, OH, OW, K, stride, dilation;
  bool relu;
};

// Needs K of 3 or 5, C and O divisible by 16, W by 4 · stride, and OH by rows.
void forward(const Shape& shape, Address x, Address depthwise, Address pointwise, Address y, int rows,
             int shared_bytes, Address stream);

// The address of a gradient is 0 where it is not wanted. Partial sums, one a tile: pointwise_partial
// [tiles, O, C], depthwise_partial [tiles, C, K²].
void backward(const Shape& shape, Address dy, Address x, Address depthwise, Address pointwise, Address dx,
              Address depthwise_grad, Address pointwise_grad, Address depthwise_partial,
              Address pointwise_partial, int rows, int shared_bytes, Address stream);

}  // namespace sepconv
