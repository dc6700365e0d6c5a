// hinge_cross_entropy: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "hinge_cross_entropy.h"

namespace bdfast {
namespace {

int64_t hinge_cross_entropy_fwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                uintptr_t target, float margin, bool batch_hinge, int reduction, uintptr_t loss,
                                uintptr_t stats, uintptr_t grad_logits) {
  const HingeCrossEntropyArgs args{labelled_rows(logits, dtype, rows, classes, row_stride, target), margin,
                                   batch_hinge};
  return BDFAST_CALL_BEST(hinge_cross_entropy_fwd, args, static_cast<Reduction>(reduction), pointer<float>(loss),
                          pointer<float>(stats), pointer<void>(grad_logits));
}

void hinge_cross_entropy_bwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                             uintptr_t target, float margin, bool batch_hinge, int reduction, uintptr_t grad_loss,
                             uintptr_t loss, uintptr_t stats, uintptr_t grad_logits) {
  const HingeCrossEntropyArgs args{labelled_rows(logits, dtype, rows, classes, row_stride, target), margin,
                                   batch_hinge};
  BDFAST_CALL_BEST(hinge_cross_entropy_bwd, args, static_cast<Reduction>(reduction), pointer<const float>(grad_loss),
                   pointer<const float>(loss), pointer<const float>(stats), pointer<void>(grad_logits));
}

void bind_hinge_cross_entropy(py::module_& m) {
  m.def("hinge_cross_entropy_fwd", &hinge_cross_entropy_fwd, nogil());
  m.def("hinge_cross_entropy_bwd", &hinge_cross_entropy_bwd, nogil());
}

}  // namespace
}  // namespace bdfast
