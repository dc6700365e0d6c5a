// sce_margin on the CPU: logsumexp(z_j, j != y) - z_y of each row, +inf for rows that are not finite.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bdfast {

struct SceMarginArgs {
  const void* logits;  // [N, C] of `dtype`, rows `row_stride` elements apart, classes contiguous
  DType dtype;
  int64_t rows;     // N
  int64_t classes;  // C
  int64_t row_stride;
  const int64_t* target;  // [N]
};

// Writes `margin` [N]. Returns the index of the first row whose target lies outside [0, C), or -1; nothing of use is
// written in that case.
BDFAST_DECLARE_CPU_KERNEL(int64_t sce_margin(const SceMarginArgs& args, float* margin))

}  // namespace bdfast
