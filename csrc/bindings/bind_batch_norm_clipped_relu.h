// batch_norm_clipped_relu: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "batch_norm_clipped_relu.h"

namespace bdfast {
namespace {

void batch_norm_clipped_relu_fwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner,
                                 uintptr_t running_mean, uintptr_t running_var, uintptr_t weight, uintptr_t bias,
                                 double eps, uintptr_t bound, int64_t bounds, float limit, uintptr_t y, uintptr_t scale,
                                 uintptr_t pass, uintptr_t clip) {
  const BatchNormClippedReluArgs args{pointer<const void>(x),
                                      static_cast<DType>(dtype),
                                      {numel, channels, inner},
                                      pointer<const float>(running_mean),
                                      pointer<const float>(running_var),
                                      pointer<const float>(weight),
                                      pointer<const float>(bias),
                                      eps,
                                      bound != 0 ? pointer<const float>(bound) : &limit,
                                      bound != 0 ? bounds : 1};
  BDFAST_CALL_BEST(batch_norm_clipped_relu_fwd, args, pointer<void>(y), pointer<float>(scale), pointer<uint32_t>(pass),
                   pointer<uint32_t>(clip));
}

void bind_batch_norm_clipped_relu(py::module_& m) {
  m.def("batch_norm_clipped_relu_fwd", &batch_norm_clipped_relu_fwd, nogil());
}

}  // namespace
}  // namespace bdfast
