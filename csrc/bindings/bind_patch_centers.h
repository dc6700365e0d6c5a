// patch_centers: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "cuda_api.h"
#include "patch_centers.h"

namespace bdfast {
namespace {

PatchCentersArgs patch_centers_args(uintptr_t ids, int64_t count, int64_t height, int64_t width, uint64_t key) {
  return {pointer<const int64_t>(ids), count, height, width, key};
}

void patch_centers(uintptr_t ids, int64_t count, int64_t height, int64_t width, uint64_t key, uintptr_t centers) {
  BDFAST_CALL_BEST(patch_centers, patch_centers_args(ids, count, height, width, key), pointer<int32_t>(centers));
}

#ifdef BDFAST_WITH_CUDA
void patch_centers_on_gpu(uintptr_t ids, int64_t count, int64_t height, int64_t width, uint64_t key, uintptr_t centers,
                          uintptr_t stream) {
  patch_centers_cuda(patch_centers_args(ids, count, height, width, key), pointer<int32_t>(centers),
                     pointer<void>(stream));
}
#endif

void bind_patch_centers(py::module_& m) {
  m.def("patch_centers", &patch_centers, nogil());
#ifdef BDFAST_WITH_CUDA
  m.def("patch_centers_cuda", &patch_centers_on_gpu, nogil());
#endif
}

}  // namespace
}  // namespace bdfast
