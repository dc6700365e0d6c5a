// sce_loss: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "sce_loss.h"

namespace bdfast {
namespace {

SceLossArgs sce_loss_args(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                          uintptr_t target, float alpha, float reverse) {
  return {pointer<const void>(logits),
          static_cast<DType>(dtype),
          rows,
          classes,
          row_stride,
          pointer<const int64_t>(target),
          alpha,
          reverse};
}

int64_t sce_loss_fwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t target,
                     float alpha, float reverse, int reduction, uintptr_t loss, uintptr_t stats,
                     uintptr_t grad_logits) {
  const auto args = sce_loss_args(logits, dtype, rows, classes, row_stride, target, alpha, reverse);
  return BDFAST_CALL_BEST(sce_loss_fwd, args, static_cast<Reduction>(reduction), pointer<float>(loss),
                          pointer<float>(stats), pointer<void>(grad_logits));
}

void sce_loss_bwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t target,
                  float alpha, float reverse, int reduction, uintptr_t grad_loss, uintptr_t stats,
                  uintptr_t grad_logits) {
  const auto args = sce_loss_args(logits, dtype, rows, classes, row_stride, target, alpha, reverse);
  BDFAST_CALL_BEST(sce_loss_bwd, args, static_cast<Reduction>(reduction), pointer<const float>(grad_loss),
                   pointer<const float>(stats), pointer<void>(grad_logits));
}

void bind_sce_loss(py::module_& m) {
  m.def("sce_loss_fwd", &sce_loss_fwd, nogil());
  m.def("sce_loss_bwd", &sce_loss_bwd, nogil());
}

}  // namespace
}  // namespace bdfast
