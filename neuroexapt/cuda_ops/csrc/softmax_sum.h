// Launchers of the weighted sum y = Σ_k w_k · x_k over a list of tensors.
//
// Addresses travel as integers, and no torch header is needed, so the kernels compile in seconds.
// Legend: K operands of n elements each, all in the same dense memory order; scores: K floats, the
// weights themselves or, with is_logits, the logits whose softmax the weights are.
#pragma once

#include <cstdint>
#include <vector>

constexpr int kMaxOperands = 48;  // whose sums fill the 99 KB of shared memory that every GPU since sm_86 has
// Blocks that share a reduction over n: 2 for each of the 132 multiprocessors of an H100. Fixed, so
// that the order of summation, and with it every bit of the result, depends on n alone.
constexpr int kMaxSplits = 132 * 2;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

using Address = std::uintptr_t;

void softmax_sum_forward(const std::vector<Address>& xs, Address scores, Address y, int64_t n, DType dtype,
                         bool is_logits, Address stream);

// grad_xs: an address per operand, 0 where no gradient is wanted. grad_scores: 0 where none is wanted,
// and then neither xs nor partials (K · kMaxSplits floats of scratch) is touched.
void softmax_sum_backward(Address grad_y, const std::vector<Address>& xs, Address scores,
                          const std::vector<Address>& grad_xs, Address grad_scores, Address partials,
                          int64_t n, DType dtype, bool is_logits, Address stream);
