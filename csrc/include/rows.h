// What kernels over the rows of a [N, C] matrix share: chunks of rows, 16 rows a vector, labels, dispatch on the dtype.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bdfast {

enum class Reduction : int { none = 0, sum = 1, mean = 2 };

namespace BDFAST_ISA_NAMESPACE {

constexpr int64_t kRowsPerChunk = 64;

// Rows of up to this many classes are computed 16 rows at a time, one a vector lane: a row of 10 would leave most of a
// vector, and all of a loop's start and end, to waste.
constexpr int64_t kNarrow = 32;
constexpr int64_t kLanes = 16;

inline int64_t row_chunks(int64_t rows) { return (rows + kRowsPerChunk - 1) / kRowsPerChunk; }

// Index of the first label outside [0, classes), or -1.
inline int64_t first_label_outside(const int64_t* target, int64_t rows, int64_t classes) {
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] < 0 || target[i] >= classes) return i;
  }
  return -1;
}

// block[j][lane] = rows[lane][j] of 16 rows, in float32. One pass of scalar moves costs less than a strided gather in
// each of the passes that follow.
template <class T>
void load_transposed(const T* rows, int64_t stride, int64_t classes, float* block) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int64_t j = 0; j < classes; ++j) block[j * kLanes + lane] = to_float(rows[lane * stride + j]);
  }
}

// Calls `body` with a null pointer whose type tells the element type.
template <class Body>
auto visit_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float16:
      return body(static_cast<Float16*>(nullptr));
    case DType::bfloat16:
      return body(static_cast<BFloat16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
