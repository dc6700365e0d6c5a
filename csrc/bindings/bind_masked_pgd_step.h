// masked_pgd_step: what bdfast._C offers of it.
#pragma once

#include "cuda_api.h"
#include "images.h"
#include "masked_pgd_step.h"

namespace bdfast {
namespace {

MaskedPgdStepArgs masked_pgd_step_args(uintptr_t x_adv, uintptr_t x, uintptr_t grad, int dtype, const Four& shape,
                                       const Four& x_adv_strides, const Four& x_strides, const Four& grad_strides,
                                       int64_t radius, const Centers& centers, const PerChannel& step_size,
                                       const PerChannel& eps, const PerChannel& lower, const PerChannel& upper) {
  return {pointer<void>(x_adv),         pointer<const void>(x),
          pointer<const void>(grad),    static_cast<DType>(dtype),
          image_strides(x_adv_strides), image_strides(x_strides),
          image_strides(grad_strides),  patch_geometry(shape, radius, centers),
          channel_value_of(step_size),  channel_value_of(eps),
          channel_value_of(lower),      channel_value_of(upper)};
}

void masked_pgd_step(uintptr_t x_adv, uintptr_t x, uintptr_t grad, int dtype, const Four& shape,
                     const Four& x_adv_strides, const Four& x_strides, const Four& grad_strides, int64_t radius,
                     const Centers& centers, const PerChannel& step_size, const PerChannel& eps,
                     const PerChannel& lower, const PerChannel& upper) {
  const auto args = masked_pgd_step_args(x_adv, x, grad, dtype, shape, x_adv_strides, x_strides, grad_strides, radius,
                                         centers, step_size, eps, lower, upper);
  BDFAST_CALL_BEST(masked_pgd_step, args);
}

#ifdef BDFAST_WITH_CUDA
void masked_pgd_step_on_gpu(uintptr_t x_adv, uintptr_t x, uintptr_t grad, int dtype, const Four& shape,
                            const Four& x_adv_strides, const Four& x_strides, const Four& grad_strides, int64_t radius,
                            const Centers& centers, const PerChannel& step_size, const PerChannel& eps,
                            const PerChannel& lower, const PerChannel& upper, uintptr_t stream) {
  const auto args = masked_pgd_step_args(x_adv, x, grad, dtype, shape, x_adv_strides, x_strides, grad_strides, radius,
                                         centers, step_size, eps, lower, upper);
  masked_pgd_step_cuda(args, pointer<void>(stream));
}
#endif

void bind_masked_pgd_step(py::module_& m) {
  m.def("masked_pgd_step", &masked_pgd_step, nogil());
#ifdef BDFAST_WITH_CUDA
  m.def("masked_pgd_step_cuda", &masked_pgd_step_on_gpu, nogil());
#endif
}

}  // namespace
}  // namespace bdfast
