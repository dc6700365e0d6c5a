// smallest_per_class: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "cuda_api.h"
#include "smallest_per_class.h"

namespace bdfast {
namespace {

int64_t smallest_per_class(uintptr_t scores, uintptr_t labels, int64_t count, int64_t k, int64_t classes,
                           uintptr_t indices, uintptr_t counts) {
  const SmallestPerClassArgs args{pointer<const float>(scores), pointer<const int64_t>(labels), count, k, classes};
  return BDFAST_CALL_BEST(smallest_per_class, args, pointer<int64_t>(indices), pointer<int64_t>(counts));
}

#ifdef BDFAST_WITH_CUDA
void smallest_per_class_on_gpu(uintptr_t scores, uintptr_t labels, int64_t count, int64_t k, int64_t classes,
                               uintptr_t keys, uintptr_t counters, uintptr_t indices, uintptr_t counts,
                               uintptr_t stream) {
  auto* sizes = pointer<unsigned>(counters);
  smallest_per_class_cuda(
      {pointer<const float>(scores), pointer<const int64_t>(labels), count, k, classes},
      {pointer<uint64_t>(keys), sizes, sizes + classes, sizes + classes + 1, sizes + 2 * classes + 1},
      pointer<int64_t>(indices), pointer<int64_t>(counts), pointer<void>(stream));
}
#endif

void bind_smallest_per_class(py::module_& m) {
  m.def("smallest_per_class", &smallest_per_class, nogil());
#ifdef BDFAST_WITH_CUDA
  m.def("smallest_per_class_cuda", &smallest_per_class_on_gpu, nogil());
#endif
}

}  // namespace
}  // namespace bdfast
