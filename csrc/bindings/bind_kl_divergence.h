// kl_divergence: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "kl_divergence.h"

namespace bdfast {
namespace {

KlDivergenceArgs kl_args(uintptr_t logits_p, uintptr_t logits_q, int dtype, int64_t rows, int64_t classes,
                         int64_t stride_p, int64_t stride_q) {
  return {pointer<const void>(logits_p),
          pointer<const void>(logits_q),
          static_cast<DType>(dtype),
          rows,
          classes,
          stride_p,
          stride_q};
}

void kl_divergence_fwd(uintptr_t logits_p, uintptr_t logits_q, int dtype, int64_t rows, int64_t classes,
                       int64_t stride_p, int64_t stride_q, int reduction, uintptr_t loss, uintptr_t stats) {
  const auto args = kl_args(logits_p, logits_q, dtype, rows, classes, stride_p, stride_q);
  BDFAST_CALL_BEST(kl_divergence_fwd, args, static_cast<Reduction>(reduction), pointer<float>(loss),
                   pointer<float>(stats));
}

void kl_divergence_bwd(uintptr_t logits_p, uintptr_t logits_q, int dtype, int64_t rows, int64_t classes,
                       int64_t stride_p, int64_t stride_q, int reduction, uintptr_t grad_loss, uintptr_t stats,
                       uintptr_t grad_p, uintptr_t grad_q) {
  const auto args = kl_args(logits_p, logits_q, dtype, rows, classes, stride_p, stride_q);
  BDFAST_CALL_BEST(kl_divergence_bwd, args, static_cast<Reduction>(reduction), pointer<const float>(grad_loss),
                   pointer<const float>(stats), pointer<void>(grad_p), pointer<void>(grad_q));
}

void bind_kl_divergence(py::module_& m) {
  m.def("kl_divergence_fwd", &kl_divergence_fwd, nogil());
  m.def("kl_divergence_bwd", &kl_divergence_bwd, nogil());
}

}  // namespace
}  // namespace bdfast
