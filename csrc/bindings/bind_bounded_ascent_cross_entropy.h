// bounded_ascent_cross_entropy: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "bounded_ascent_cross_entropy.h"

namespace bdfast {
namespace {

int64_t bounded_ascent_cross_entropy_fwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                         uintptr_t target, int64_t num_descend, double mu, float tau, uintptr_t loss,
                                         uintptr_t stats, uintptr_t grad_logits) {
  const BoundedAscentCrossEntropyArgs args{labelled_rows(logits, dtype, rows, classes, row_stride, target), num_descend,
                                           mu, tau};
  return BDFAST_CALL_BEST(bounded_ascent_cross_entropy_fwd, args, pointer<float>(loss), pointer<float>(stats),
                          pointer<void>(grad_logits));
}

void bounded_ascent_cross_entropy_bwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                      uintptr_t target, int64_t num_descend, double mu, float tau, uintptr_t grad_loss,
                                      uintptr_t stats, uintptr_t grad_logits) {
  const BoundedAscentCrossEntropyArgs args{labelled_rows(logits, dtype, rows, classes, row_stride, target), num_descend,
                                           mu, tau};
  BDFAST_CALL_BEST(bounded_ascent_cross_entropy_bwd, args, pointer<const float>(grad_loss), pointer<const float>(stats),
                   pointer<void>(grad_logits));
}

void bind_bounded_ascent_cross_entropy(py::module_& m) {
  m.def("bounded_ascent_cross_entropy_fwd", &bounded_ascent_cross_entropy_fwd, nogil());
  m.def("bounded_ascent_cross_entropy_bwd", &bounded_ascent_cross_entropy_bwd, nogil());
}

}  // namespace
}  // namespace bdfast
