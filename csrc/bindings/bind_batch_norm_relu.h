// batch_norm_relu: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "batch_norm_relu.h"

namespace bdfast {
namespace {

void batch_norm_relu_fwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner, uintptr_t weight,
                         uintptr_t bias, uintptr_t residual, uintptr_t running_mean, uintptr_t running_var,
                         double momentum, double eps, bool relu, uintptr_t y, uintptr_t mean, uintptr_t var,
                         uintptr_t saved) {
  const BatchNormReluForward args{pointer<const void>(x),
                                  static_cast<DType>(dtype),
                                  {numel, channels, inner},
                                  pointer<const float>(weight),
                                  pointer<const float>(bias),
                                  pointer<const void>(residual),
                                  pointer<float>(running_mean),
                                  pointer<float>(running_var),
                                  momentum,
                                  eps,
                                  relu,
                                  pointer<void>(y),
                                  pointer<float>(mean),
                                  pointer<float>(var),
                                  pointer<float>(saved)};
  BDFAST_CALL_BEST(batch_norm_relu_fwd, args);
}

void batch_norm_relu_bwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner, uintptr_t grad,
                         uintptr_t y, uintptr_t saved, bool relu, uintptr_t grad_x, uintptr_t masked,
                         uintptr_t grad_weight, uintptr_t grad_bias) {
  const BatchNormReluBackward args{pointer<const void>(grad),
                                   pointer<const void>(x),
                                   pointer<const void>(y),
                                   static_cast<DType>(dtype),
                                   {numel, channels, inner},
                                   pointer<const float>(saved),
                                   relu,
                                   pointer<void>(grad_x),
                                   pointer<void>(masked),
                                   pointer<float>(grad_weight),
                                   pointer<float>(grad_bias)};
  BDFAST_CALL_BEST(batch_norm_relu_bwd, args);
}

void bind_batch_norm_relu(py::module_& m) {
  m.def("batch_norm_relu_fwd", &batch_norm_relu_fwd, nogil());
  m.def("batch_norm_relu_bwd", &batch_norm_relu_bwd, nogil());
}

}  // namespace
}  // namespace bdfast
