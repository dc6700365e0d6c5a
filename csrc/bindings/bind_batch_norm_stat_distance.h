// batch_norm_stat_distance: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "batch_norm_stat_distance.h"

namespace bdfast {
namespace {

BatchNormStatDistanceArgs stat_distance_args(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner,
                                             uintptr_t running_mean, uintptr_t running_var) {
  return {pointer<const void>(x),
          static_cast<DType>(dtype),
          {numel, channels, inner},
          pointer<const float>(running_mean),
          pointer<const float>(running_var)};
}

double batch_norm_stat_distance_fwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner,
                                    uintptr_t running_mean, uintptr_t running_var, uintptr_t stats) {
  const auto args = stat_distance_args(x, dtype, numel, channels, inner, running_mean, running_var);
  return BDFAST_CALL_BEST(batch_norm_stat_distance_fwd, args, pointer<double>(stats));
}

void batch_norm_stat_distance_bwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner,
                                  uintptr_t running_mean, uintptr_t running_var, uintptr_t stats, float grad,
                                  uintptr_t grad_x) {
  const auto args = stat_distance_args(x, dtype, numel, channels, inner, running_mean, running_var);
  BDFAST_CALL_BEST(batch_norm_stat_distance_bwd, args, pointer<const double>(stats), grad, pointer<void>(grad_x));
}

void bind_batch_norm_stat_distance(py::module_& m) {
  m.def("batch_norm_stat_distance_fwd", &batch_norm_stat_distance_fwd, nogil());
  m.def("batch_norm_stat_distance_bwd", &batch_norm_stat_distance_bwd, nogil());
}

}  // namespace
}  // namespace bdfast
