// batch_norm_stat_distance: how far a batch's statistics are from those that a batch norm keeps.
//
//   distance = sum_c (mean_c - running_mean_c)^2 + (var_c - running_var_c)^2,   var biased, over all M values of a channel
//   dx       = (2 / M) [(mean_c - running_mean_c) + 2 (var_c - running_var_c) (x - mean_c)] * grad
#pragma once

#include <cstdint>

#include "channel_layout.h"
#include "dtype.h"

namespace bdfast {

struct BatchNormStatDistanceArgs {
  const void* x;
  DType dtype;
  ChannelLayout layout;
  const float* running_mean;  // [C]
  const float* running_var;   // [C]
};

// stats: [2, C], the means of the batch and then its variances. Returns the distance.
BDFAST_DECLARE_CPU_KERNEL(double batch_norm_stat_distance_fwd(const BatchNormStatDistanceArgs& args, double* stats))
BDFAST_DECLARE_CPU_KERNEL(void batch_norm_stat_distance_bwd(const BatchNormStatDistanceArgs& args, const double* stats,
                                                            float grad, void* grad_x))

}  // namespace bdfast
