// projected_sgd_step: what bdfast._C offers of it.
#pragma once

#include <array>
#include <vector>

#include "addresses.h"
#include "cuda_api.h"
#include "projected_sgd_step.h"

namespace bdfast {
namespace {

using Layers = std::vector<std::array<uintptr_t, 5>>;  // addresses of W, W0, G and V, and the number of their elements

std::vector<ProjectedSgdSegment> make_segments(const Layers& layers) {
  std::vector<ProjectedSgdSegment> segments;
  segments.reserve(layers.size());
  for (const auto& [weight, anchor, grad, momentum, numel] : layers) {
    segments.push_back({pointer<float>(weight), pointer<const float>(anchor), pointer<const float>(grad),
                        pointer<float>(momentum), static_cast<int64_t>(numel)});
  }
  return segments;
}

void projected_sgd_step(const Layers& layers, float lr, float momentum, float distance_weight, uintptr_t norms,
                        uintptr_t distances) {
  const auto segments = make_segments(layers);
  const ProjectedSgdScalars scalars{lr, momentum, distance_weight};
  BDFAST_CALL_BEST(projected_sgd_step, segments.data(), static_cast<int64_t>(segments.size()), scalars,
                   pointer<const float>(norms), pointer<float>(distances));
}

#ifdef BDFAST_WITH_CUDA
int64_t projected_sgd_step_scratch_of(const std::vector<int64_t>& numels) {
  return projected_sgd_step_scratch(numels.data(), static_cast<int64_t>(numels.size()));
}

void projected_sgd_step_on_gpu(const Layers& layers, float lr, uintptr_t lr_pointer, float momentum,
                               float distance_weight, uintptr_t norms, uintptr_t distances, uintptr_t scratch,
                               uintptr_t stream) {
  const auto segments = make_segments(layers);
  const ProjectedSgdScalars scalars{lr, momentum, distance_weight};
  projected_sgd_step_cuda(segments.data(), static_cast<int64_t>(segments.size()), scalars,
                          pointer<const float>(lr_pointer), pointer<const float>(norms), pointer<float>(distances),
                          pointer<double>(scratch), pointer<void>(stream));
}
#endif

void bind_projected_sgd_step(py::module_& m) {
  m.def("projected_sgd_step", &projected_sgd_step, nogil());
#ifdef BDFAST_WITH_CUDA
  m.def("projected_sgd_step_scratch", &projected_sgd_step_scratch_of, nogil());
  m.def("projected_sgd_step_cuda", &projected_sgd_step_on_gpu, nogil());
#endif
}

}  // namespace
}  // namespace bdfast
