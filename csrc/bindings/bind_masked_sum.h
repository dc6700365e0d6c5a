// masked_sum: what bdfast._C offers of it.
#pragma once

#include "addresses.h"
#include "masked_sum.h"

namespace bdfast {
namespace {

void masked_sum(uintptr_t y, uintptr_t first, uintptr_t second, int dtype, int64_t numel, uintptr_t out) {
  const MaskedSum args{
      pointer<const void>(y), pointer<const void>(first), pointer<const void>(second), static_cast<DType>(dtype), numel,
      pointer<void>(out)};
  BDFAST_CALL_BEST(masked_sum, args);
}

void bind_masked_sum(py::module_& m) { m.def("masked_sum", &masked_sum, nogil()); }

}  // namespace
}  // namespace bdfast
