// masked_random_start: what bdfast._C offers of it.
#pragma once

#include "cuda_api.h"
#include "images.h"
#include "masked_random_start.h"

namespace bdfast {
namespace {

MaskedRandomStartArgs masked_random_start_args(uintptr_t x_adv, int dtype, const Four& shape, const Four& strides,
                                               int64_t radius, const Centers& centers, uintptr_t ids, uint64_t key,
                                               const PerChannel& eps, const PerChannel& lower,
                                               const PerChannel& upper) {
  return {pointer<void>(x_adv),        static_cast<DType>(dtype),
          image_strides(strides),      patch_geometry(shape, radius, centers),
          pointer<const int64_t>(ids), key,
          channel_value_of(eps),       channel_value_of(lower),
          channel_value_of(upper)};
}

void masked_random_start(uintptr_t x_adv, int dtype, const Four& shape, const Four& strides, int64_t radius,
                         const Centers& centers, uintptr_t ids, uint64_t key, const PerChannel& eps,
                         const PerChannel& lower, const PerChannel& upper) {
  const auto args =
      masked_random_start_args(x_adv, dtype, shape, strides, radius, centers, ids, key, eps, lower, upper);
  BDFAST_CALL_BEST(masked_random_start, args);
}

#ifdef BDFAST_WITH_CUDA
void masked_random_start_on_gpu(uintptr_t x_adv, int dtype, const Four& shape, const Four& strides, int64_t radius,
                                const Centers& centers, uintptr_t ids, uint64_t key, const PerChannel& eps,
                                const PerChannel& lower, const PerChannel& upper, uintptr_t x, uintptr_t stream) {
  const auto args =
      masked_random_start_args(x_adv, dtype, shape, strides, radius, centers, ids, key, eps, lower, upper);
  masked_random_start_cuda(args, pointer<const void>(x), pointer<void>(stream));
}
#endif

void bind_masked_random_start(py::module_& m) {
  m.def("masked_random_start", &masked_random_start, nogil());
#ifdef BDFAST_WITH_CUDA
  m.def("masked_random_start_cuda", &masked_random_start_on_gpu, nogil());
#endif
}

}  // namespace
}  // namespace bdfast
