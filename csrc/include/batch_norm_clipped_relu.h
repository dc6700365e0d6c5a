// batch_norm_clipped_relu on the CPU: eval-mode batch norm, ReLU and clip in one pass. Its backward is clipped_relu_bwd.
#pragma once

#include <cstdint>

#include "channel_layout.h"
#include "dtype.h"
#include "isa.h"

namespace bdfast {

struct BatchNormClippedReluArgs {
  const void* x;  // [numel] of `dtype`, in memory order
  DType dtype;
  ChannelLayout layout;
  const float* running_mean;  // [channels]
  const float* running_var;   // [channels]
  const float* weight;        // [channels], or null for 1
  const float* bias;          // [channels], or null for 0
  double eps;
  const float* bound;  // [bounds]
  int64_t bounds;      // `channels`, or 1 for one bound that all channels share
};

// Writes `y`, of the dtype and layout of x; `scale` [channels] = weight / sqrt(running_var + eps), which the backward
// needs; and the bits of `pass` and `clip` where these are not null (see channel_clip.h).
BDFAST_DECLARE_CPU_KERNEL(void batch_norm_clipped_relu_fwd(const BatchNormClippedReluArgs& args, void* y, float* scale,
                                                           uint32_t* pass, uint32_t* clip))

}  // namespace bdfast
