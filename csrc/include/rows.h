// What kernels over the rows of a [N, C] matrix share: chunks of rows, 16 rows a vector, labels, dispatch on the dtype.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#include "dtype.h"
#include "isa.h"

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

// Index of the first label outside [0, classes), or -1.
inline int64_t first_label_outside(const int64_t* target, int64_t rows, int64_t classes) {
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] < 0 || target[i] >= classes) return i;
  }
  return -1;
}

// block[j][lane] = rows[lane][j] of `count` <= kGroup rows, in float32; further lanes are 0. One pass of moves costs less
// than a strided gather in each of the passes that follow.
template <int64_t kGroup, class T>
void load_transposed(const T* rows, int64_t stride, int64_t classes, int64_t count, float* block) {
  int64_t lane = 0;
#ifdef __SSE2__
  if constexpr (std::is_same_v<T, float>) {
    // 4 x 4 at a time; the last four classes overlap those before them where C is not a multiple of 4.
    for (; classes >= 4 && lane + 4 <= count; lane += 4) {
      const float* four = rows + lane * stride;
      for (int64_t next = 0; next < classes; next += 4) {
        const int64_t j = std::min(next, classes - 4);
        __m128 a = _mm_loadu_ps(four + j), b = _mm_loadu_ps(four + stride + j);
        __m128 c = _mm_loadu_ps(four + 2 * stride + j), d = _mm_loadu_ps(four + 3 * stride + j);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(block + j * kGroup + lane, a);
        _mm_storeu_ps(block + (j + 1) * kGroup + lane, b);
        _mm_storeu_ps(block + (j + 2) * kGroup + lane, c);
        _mm_storeu_ps(block + (j + 3) * kGroup + lane, d);
      }
    }
  }
#endif
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t i = lane; i < count; ++i) block[j * kGroup + i] = to_float(rows[i * stride + j]);
    for (int64_t i = count; i < kGroup; ++i) block[j * kGroup + i] = 0.0f;
  }
}

// rows[lane][j] = block[j][lane] for `count` <= kGroup rows side by side, `classes` long.
template <int64_t kGroup, class T>
void store_transposed(const float* block, int64_t classes, int64_t count, T* rows) {
  int64_t lane = 0;
#ifdef __SSE2__
  if constexpr (std::is_same_v<T, float>) {
    // As above: the last four classes overlap those before them.
    for (; classes >= 4 && lane + 4 <= count; lane += 4) {
      float* four = rows + lane * classes;
      for (int64_t next = 0; next < classes; next += 4) {
        const int64_t j = std::min(next, classes - 4);
        __m128 a = _mm_loadu_ps(block + j * kGroup + lane), b = _mm_loadu_ps(block + (j + 1) * kGroup + lane);
        __m128 c = _mm_loadu_ps(block + (j + 2) * kGroup + lane), d = _mm_loadu_ps(block + (j + 3) * kGroup + lane);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(four + j, a);
        _mm_storeu_ps(four + classes + j, b);
        _mm_storeu_ps(four + 2 * classes + j, c);
        _mm_storeu_ps(four + 3 * classes + j, d);
      }
    }
  }
#endif
  for (; lane < count; ++lane) {
    for (int64_t j = 0; j < classes; ++j) store(rows + lane * classes + j, block[j * kGroup + lane]);
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
