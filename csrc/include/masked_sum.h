// The gradient of a ReLU whose output one layer reads, or two, on the CPU:  out = y <= 0 ? 0 : first + second
//
// bdfast/runtime/relu_gradient.py has the equation and is the one caller. The sum is rounded once, and NaN in y passes the
// gradient on, as in PyTorch's threshold_backward: the result is the same to the bit.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bdfast {

struct MaskedSum {
  const void* y;       // [numel] of `dtype`, all in one memory order
  const void* first;   // [numel]
  const void* second;  // [numel], or null
  DType dtype;
  int64_t numel;
  void* out;  // [numel]
};

BDFAST_DECLARE_CPU_KERNEL(void masked_sum(const MaskedSum& args))

}  // namespace bdfast
