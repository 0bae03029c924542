// Candidates that were not drawn do not run: `mixing` is the address of a candidate's mixing weight where that decides,
// and 0 where the candidate runs in any case. What a candidate that does not run would have written is left as it was,
// so nothing may read it.
#pragma once

#include <cstdint>

namespace drawn {

__device__ inline bool runs(std::uintptr_t mixing) {
  return mixing == 0 || __ldg(reinterpret_cast<const float*>(mixing)) != 0.f;
}

}  // namespace drawn
