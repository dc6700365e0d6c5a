// histogram_entropy: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "cuda_api.h"
#include "histogram_entropy.h"

namespace bdfast {
namespace {

int64_t histogram_entropy(uintptr_t x, int dtype, int64_t rows, int64_t columns, uintptr_t terms, double step,
                          bool strict, uintptr_t entropy) {
  const HistogramEntropyArgs args{
      pointer<const void>(x), static_cast<DType>(dtype), rows, columns, pointer<const float>(terms), step, strict};
  return BDFAST_CALL_BEST(histogram_entropy, args, pointer<float>(entropy));
}

#ifdef BDFAST_WITH_CUDA
void histogram_entropy_on_gpu(uintptr_t x, int64_t rows, int64_t columns, double step, bool strict, uintptr_t parts,
                              uintptr_t entropy, uintptr_t stream) {
  const HistogramEntropyArgs args{pointer<const void>(x), DType::float32, rows, columns, nullptr, step, strict};
  histogram_entropy_cuda(args, pointer<float>(parts), pointer<float>(entropy), pointer<void>(stream));
}
#endif

void bind_histogram_entropy(py::module_& m) {
  m.def("histogram_entropy", &histogram_entropy, nogil());
#ifdef BDFAST_WITH_CUDA
  m.def("histogram_entropy_cuda", &histogram_entropy_on_gpu, nogil());
#endif
}

}  // namespace
}  // namespace bdfast
