// batch_norm_relu: batch norm with the statistics of the batch, a shortcut and ReLU; in training, both ways.
//
//   y  = max((x - pivot_c) * scale_c + shift_c + r, 0)
//   dx = scale_c * (g + slope_c * (x - pivot_c) + offset_c),   g = [y > 0] dy
//
// pivot is a number near the mean; the others follow from the sums of x - pivot, of its squares, of g and of
// g (x - pivot) over all M values of a channel. bdfast/ops/batch_norm_relu.py has the equations.
#pragma once

#include <cstdint>

#include "channel_layout.h"
#include "dtype.h"
#include "isa.h"

namespace bdfast {

struct BatchNormReluForward {
  const void* x;  // [numel] of `dtype`, in memory order, not empty
  DType dtype;
  ChannelLayout layout;
  const float* weight;   // [channels]
  const float* bias;     // [channels]
  const void* residual;  // [numel], or null for none
  float* running_mean;   // [channels], changed in place, or null for none
  float* running_var;    // [channels]
  double momentum;
  double eps;
  bool relu;
  void* y;       // [numel]
  float* mean;   // [channels]
  float* var;    // [channels], biased
  float* saved;  // [5, channels]: pivot, scale, shift, 1 / sqrt(var + eps), mean - pivot
};

struct BatchNormReluBackward {
  const void* grad;  // [numel] of `dtype`, in memory order, not empty
  const void* x;     // [numel]
  const void* y;     // [numel], or null where the mask of the ReLU follows from x
  DType dtype;
  ChannelLayout layout;
  const float* saved;  // [5, channels]
  bool relu;
  void* grad_x;        // [numel]
  void* masked;        // [numel], g; written where y is given
  float* grad_weight;  // [channels]
  float* grad_bias;    // [channels]
};

BDFAST_DECLARE_CPU_KERNEL(void batch_norm_relu_fwd(const BatchNormReluForward& args))
BDFAST_DECLARE_CPU_KERNEL(void batch_norm_relu_bwd(const BatchNormReluBackward& args))

}  // namespace bdfast
