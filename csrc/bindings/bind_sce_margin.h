// sce_margin: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "sce_margin.h"

namespace bdfast {
namespace {

int64_t sce_margin(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t target,
                   uintptr_t margin) {
  const LabelledRows args = labelled_rows(logits, dtype, rows, classes, row_stride, target);
  return BDFAST_CALL_BEST(sce_margin, args, pointer<float>(margin));
}

void bind_sce_margin(py::module_& m) { m.def("sce_margin", &sce_margin, nogil()); }

}  // namespace
}  // namespace bdfast
