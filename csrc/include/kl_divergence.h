// kl_divergence on the CPU: KL(softmax p || softmax q) of each row, and its gradients.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace bdfast {

struct KlDivergenceArgs {
  const void* logits_p;  // [N, C] of `dtype`, rows `stride_p` elements apart, classes contiguous
  const void* logits_q;  // [N, C] of `dtype`, rows `stride_q` elements apart, classes contiguous
  DType dtype;
  int64_t rows;     // N
  int64_t classes;  // C
  int64_t stride_p;
  int64_t stride_q;
};

// Writes `loss`: [N] for Reduction::none, else one float; and, where it is not null, `stats` [N, 5] = (maximum of p, sum
// of exp(z - maximum) of p, the same of q, KL).
BDFAST_DECLARE_CPU_KERNEL(void kl_divergence_fwd(const KlDivergenceArgs& args, Reduction reduction, float* loss,
                                                 float* stats))

// Writes those of `grad_p` and `grad_q` [N, C], contiguous, of the same dtype, that are not null. `grad_loss` is [N] for
// Reduction::none, else one float.
BDFAST_DECLARE_CPU_KERNEL(void kl_divergence_bwd(const KlDivergenceArgs& args, Reduction reduction,
                                                 const float* grad_loss, const float* stats, void* grad_p,
                                                 void* grad_q))

}  // namespace bdfast
