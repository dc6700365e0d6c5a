// What every binding needs: an address from Python as a pointer, a labelled batch of rows.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "rows.h"

namespace py = pybind11;

namespace bdfast {
namespace {

using nogil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

LabelledRows labelled_rows(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                           uintptr_t target) {
  return {pointer<const void>(logits),   static_cast<DType>(dtype), rows, classes, row_stride,
          pointer<const int64_t>(target)};
}

}  // namespace
}  // namespace bdfast
