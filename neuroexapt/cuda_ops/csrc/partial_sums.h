// Adds up what the parts of a sum left, in a fixed order.
//
// Addresses travel as integers, as in softmax_sum.h.
#pragma once

#include <cstdint>
#include <vector>

namespace partial_sums {

using Address = std::uintptr_t;

// sum [size] = Σ_parts partial [parts, size], fp32; zeros if what left the parts did not run (`mixing`: see drawn.cuh).
struct Job {
  Address partial, sum, mixing;
  int size, parts;
};
// `early`: while the kernel before still runs (launch.cuh).
void add_up(const std::vector<Job>& jobs, bool early, Address stream);

}  // namespace partial_sums
