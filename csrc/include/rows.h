// What kernels over the rows of a [N, C] matrix share: chunks of rows, 16 rows a vector, labels, dispatch on the dtype.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "isa.h"
#include "row_transpose.h"

namespace bdfast {

enum class Reduction : int { none = 0, sum = 1, mean = 2 };

struct LabelledRows {
  const void* logits;  // [N, C] of `dtype`, rows `row_stride` elements apart, classes contiguous
  DType dtype;
  int64_t rows;     // N
  int64_t classes;  // C
  int64_t row_stride;
  const int64_t* target;  // [N]
};

namespace BDFAST_ISA_NAMESPACE {

constexpr int64_t kRowsPerChunk = 64;

// Rows of up to this many classes are computed 16 rows at a time, one a vector lane: a row of 10 would leave most of a
// vector, and all of a loop's start and end, to waste.
constexpr int64_t kNarrow = 32;
constexpr int64_t kLanes = 16;

inline int64_t row_chunks(int64_t rows) { return (rows + kRowsPerChunk - 1) / kRowsPerChunk; }

inline bool labels_inside(const int64_t* target, int64_t count, int64_t classes) {
  bool outside = false;
#pragma omp simd reduction(| : outside)
  for (int64_t i = 0; i < count; ++i) outside |= static_cast<uint64_t>(target[i]) >= static_cast<uint64_t>(classes);
  return !outside;
}

// Index of the first label outside [0, classes), or -1.
inline int64_t first_label_outside(const int64_t* target, int64_t rows, int64_t classes) {
  for (int64_t begin = 0; begin < rows; begin += kRowsPerChunk) {
    const int64_t end = std::min(rows, begin + kRowsPerChunk);
    if (labels_inside(target + begin, end - begin, classes)) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (target[i] < 0 || target[i] >= classes) return i;
    }
  }
  return -1;
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
