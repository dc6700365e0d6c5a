// scale_to_ball: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "cuda_api.h"
#include "scale_to_ball.h"

namespace bdfast {
namespace {

ScaleToBallArgs scale_to_ball_args(uintptr_t perturbation, int dtype, int64_t images, int64_t numel, double radius,
                                   uintptr_t radii, bool one_norm) {
  return {pointer<void>(perturbation),
          static_cast<DType>(dtype),
          images,
          numel,
          radius,
          pointer<const float>(radii),
          one_norm};
}

void scale_to_ball(uintptr_t perturbation, int dtype, int64_t images, int64_t numel, double radius, uintptr_t radii,
                   bool one_norm) {
  BDFAST_CALL_BEST(scale_to_ball, scale_to_ball_args(perturbation, dtype, images, numel, radius, radii, one_norm));
}

#ifdef BDFAST_WITH_CUDA
void scale_to_ball_on_gpu(uintptr_t perturbation, int dtype, int64_t images, int64_t numel, double radius,
                          uintptr_t radii, bool one_norm, int64_t parts, uintptr_t partials, uintptr_t stream) {
  scale_to_ball_cuda(scale_to_ball_args(perturbation, dtype, images, numel, radius, radii, one_norm), parts,
                     pointer<double>(partials), pointer<void>(stream));
}
#endif

void bind_scale_to_ball(py::module_& m) {
  m.def("scale_to_ball", &scale_to_ball, nogil());
#ifdef BDFAST_WITH_CUDA
  m.def("scale_to_ball_cuda", &scale_to_ball_on_gpu, nogil());
#endif
}

}  // namespace
}  // namespace bdfast
