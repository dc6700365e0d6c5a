// clipped_relu: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "clipped_relu.h"

namespace bdfast {
namespace {

// `bound` at address 0 stands for the one number `limit`; a gradient that is not wanted has bits at address 0.
void clipped_relu_fwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner, uintptr_t bound,
                      float limit, uintptr_t y, uintptr_t pass, uintptr_t clip) {
  const ClippedReluArgs args{pointer<const void>(x),
                             static_cast<DType>(dtype),
                             {numel, channels, inner},
                             bound != 0 ? pointer<const float>(bound) : &limit};
  BDFAST_CALL_BEST(clipped_relu_fwd, args, pointer<void>(y), pointer<uint32_t>(pass), pointer<uint32_t>(clip));
}

void clipped_relu_bwd(uintptr_t grad, int dtype, int64_t numel, int64_t channels, int64_t inner, uintptr_t scale,
                      uintptr_t pass, uintptr_t clip, int64_t bounds, uintptr_t grad_x, uintptr_t grad_bound) {
  const ClippedReluGradArgs args{pointer<const void>(grad),
                                 static_cast<DType>(dtype),
                                 {numel, channels, inner},
                                 pointer<const float>(scale),
                                 pointer<const uint32_t>(pass),
                                 pointer<const uint32_t>(clip),
                                 bounds};
  BDFAST_CALL_BEST(clipped_relu_bwd, args, pointer<void>(grad_x), pointer<float>(grad_bound));
}

void bind_clipped_relu(py::module_& m) {
  m.def("clipped_relu_fwd", &clipped_relu_fwd, nogil());
  m.def("clipped_relu_bwd", &clipped_relu_bwd, nogil());
}

}  // namespace
}  // namespace bdfast
