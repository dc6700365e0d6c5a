// bounded_ascent_cross_entropy on the CPU: CE of the first rows minus mu min(CE, tau) of the others, and its gradient.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace bdfast {

struct BoundedAscentCrossEntropyArgs {
  LabelledRows rows;
  int64_t num_descend;  // n_d, 0 to N
  double mu;
  float tau;  // nats
};

// Writes `stats` [N, 2] = (row maximum, sum of exp(z - maximum)) and `loss`, one float. Where `grad_logits` is not null
// it gets the gradient for an incoming gradient of 1.
// Returns the index of the first row whose target lies outside [0, C), or -1; nothing of use is written in that case.
BDFAST_DECLARE_CPU_KERNEL(int64_t bounded_ascent_cross_entropy_fwd(const BoundedAscentCrossEntropyArgs& args,
                                                                   float* loss, float* stats, void* grad_logits))

// Writes `grad_logits` [N, C], contiguous, of the same dtype; `grad_loss` is one float.
BDFAST_DECLARE_CPU_KERNEL(void bounded_ascent_cross_entropy_bwd(const BoundedAscentCrossEntropyArgs& args,
                                                                const float* grad_loss, const float* stats,
                                                                void* grad_logits))

}  // namespace bdfast
