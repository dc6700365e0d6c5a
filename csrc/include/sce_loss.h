// sce_loss on the CPU: alpha CE + beta |A| (1 - p_y) of each row, and its gradient.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace bdfast {

struct SceLossArgs {
  const void* logits;  // [N, C] of `dtype`, rows `row_stride` elements apart, classes contiguous
  DType dtype;
  int64_t rows;     // N
  int64_t classes;  // C
  int64_t row_stride;
  const int64_t* target;  // [N]
  float alpha;            // weight of CE
  float reverse;          // beta |A|: weight of 1 - p_y
};

// Writes `stats` [N, 2] = (maximum, sum of exp(z - maximum)) over the classes that are not the label, and `loss`: [N]
// for Reduction::none, else one float. Where `grad_logits` is not null it gets the gradient for an incoming gradient of 1.
// Returns the index of the first row whose target lies outside [0, C), or -1; nothing of use is written in that case.
BDFAST_DECLARE_CPU_KERNEL(int64_t sce_loss_fwd(const SceLossArgs& args, Reduction reduction, float* loss, float* stats,
                                               void* grad_logits))

// Writes `grad_logits` [N, C], contiguous, of the same dtype. `grad_loss` is [N] for Reduction::none, else one float.
BDFAST_DECLARE_CPU_KERNEL(void sce_loss_bwd(const SceLossArgs& args, Reduction reduction, const float* grad_loss,
                                            const float* stats, void* grad_logits))

}  // namespace bdfast
