// linear_sce_margin: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "linear_sce_margin.h"

namespace bdfast {
namespace {

SceState sce_state(uintptr_t max, uintptr_t sum, uintptr_t label) {
  return {pointer<float>(max), pointer<float>(sum), pointer<float>(label)};
}

void linear_sce_margin_update(uintptr_t logits, int64_t rows, int64_t classes, int64_t first_class, uintptr_t target,
                              uintptr_t max, uintptr_t sum, uintptr_t label) {
  const LogitsTile tile{pointer<const float>(logits), rows, classes, first_class, pointer<const int64_t>(target)};
  BDFAST_CALL_BEST(linear_sce_margin_update, tile, sce_state(max, sum, label));
}

void linear_sce_margin_finish(uintptr_t max, uintptr_t sum, uintptr_t label, int64_t rows, uintptr_t margin) {
  BDFAST_CALL_BEST(linear_sce_margin_finish, sce_state(max, sum, label), rows, pointer<float>(margin));
}

void bind_linear_sce_margin(py::module_& m) {
  m.def("linear_sce_margin_update", &linear_sce_margin_update, nogil());
  m.def("linear_sce_margin_finish", &linear_sce_margin_finish, nogil());
}

}  // namespace
}  // namespace bdfast
