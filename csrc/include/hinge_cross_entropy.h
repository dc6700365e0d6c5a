// hinge_cross_entropy on the CPU: max(0, CE - margin) of each row, and its gradient.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace bdfast {

struct HingeCrossEntropyArgs {
  LabelledRows rows;
  float margin;      // nats
  bool batch_hinge;  // hinge of the mean instead of the mean of hinges
};

// Writes `stats` [N, 2] = (row maximum, sum of exp(z - maximum)) and `loss`: [N] for Reduction::none, else one float.
// Where `grad_logits` is not null (hinge of rows only) it gets the gradient for an incoming gradient of 1.
// Returns the index of the first row whose target lies outside [0, C), or -1; nothing of use is written in that case.
BDFAST_DECLARE_CPU_KERNEL(int64_t hinge_cross_entropy_fwd(const HingeCrossEntropyArgs& args, Reduction reduction,
                                                          float* loss, float* stats, void* grad_logits))

// Writes `grad_logits` [N, C], contiguous, of the same dtype. `grad_loss` is [N] for Reduction::none, else one float;
// `loss` is what the forward returned (the batch hinge is active where it is positive).
BDFAST_DECLARE_CPU_KERNEL(void hinge_cross_entropy_bwd(const HingeCrossEntropyArgs& args, Reduction reduction,
                                                       const float* grad_loss, const float* loss, const float* stats,
                                                       void* grad_logits))

}  // namespace bdfast
