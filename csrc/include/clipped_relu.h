// clipped_relu on the CPU: min(max(x, 0), bound) channel by channel, and the gradients of x and of the bound.
#pragma once

#include <cstdint>

#include "channel_layout.h"
#include "dtype.h"
#include "isa.h"

namespace bdfast {

struct ClippedReluArgs {
  const void* x;  // [numel] of `dtype`, in memory order
  DType dtype;
  ChannelLayout layout;
  const float* bound;  // [channels]
};

// Writes `y`, of the dtype and layout of x, and the bits of `pass` = [0 < x <= bound] and `clip` = [max(x, 0) > bound],
// int32 [blocks, 16], where these are not null (see channel_clip.h).
BDFAST_DECLARE_CPU_KERNEL(void clipped_relu_fwd(const ClippedReluArgs& args, void* y, uint32_t* pass, uint32_t* clip))

struct ClippedReluGradArgs {
  const void* grad;  // [numel] of `dtype`, in the memory order of x
  DType dtype;
  ChannelLayout layout;
  const float* scale;  // [channels], the derivative of t in x; null for 1
  const uint32_t* pass;
  const uint32_t* clip;
  int64_t bounds;  // `channels`, or 1 for one bound that all channels share
};

// Writes `grad_x` = grad * scale where `pass`, 0 elsewhere, if `pass` is not null, and `grad_bound` [bounds], the sums of
// grad where `clip`, if `clip` is not null.
BDFAST_DECLARE_CPU_KERNEL(void clipped_relu_bwd(const ClippedReluGradArgs& args, void* grad_x, float* grad_bound))

}  // namespace bdfast
