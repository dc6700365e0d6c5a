// Products of a few rows with a panel of columns, all sums in registers.
//
// A panel has kPanel columns: 4 registers with AVX-512, whose 32 hold sums of 6 rows, else 2 of 16. Each sum is added up
// in the order of k by fused multiply-adds, whatever rows it is computed with: rows do not depend on their batch.
#pragma once

#include <cstdint>

#include "cpu_vector.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

constexpr int64_t kRows = 6;
#if defined(__AVX512F__)
constexpr int64_t kPanelVectors = 4;
#else
constexpr int64_t kPanelVectors = 2;
#endif
constexpr int64_t kPanel = kPanelVectors * kVector;

#if defined(__GNUC__) && !defined(__clang__)
#define BDFAST_UNROLL _Pragma("GCC unroll 8")
#else
#define BDFAST_UNROLL
#endif

struct Factors {  // [rows, depth]
  const float* at;
  int64_t row;   // from one row to the next
  int64_t step;  // from one k to the next
};

struct Columns {  // [depth, kPanel]
  const float* at;
  int64_t step;  // from one k to the next
};

// c[r, :] = sum_k a[r, k] b[k, :], added to c if asked for, for kCount rows.
template <int64_t kCount, bool kAdd>
inline void multiply_rows(const Factors& a, int64_t depth, const Columns& b, float* c, int64_t c_row) {
  Vector sum[kCount][kPanelVectors] = {};
  const float *factors = a.at, *columns = b.at;
  for (int64_t k = 0; k < depth; ++k, factors += a.step, columns += b.step) {
    Vector column[kPanelVectors];
    BDFAST_UNROLL
    for (int64_t v = 0; v < kPanelVectors; ++v) column[v] = load_vector(columns + v * kVector);
    BDFAST_UNROLL
    for (int64_t r = 0; r < kCount; ++r) {
      const float factor = factors[r * a.row];
      BDFAST_UNROLL
      for (int64_t v = 0; v < kPanelVectors; ++v) sum[r][v] += factor * column[v];
    }
  }
  for (int64_t r = 0; r < kCount; ++r) {
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      float* to = c + r * c_row + v * kVector;
      store_vector(to, kAdd ? load_vector(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// c [rows, kPanel] = a b, or c + a b.
template <bool kAdd>
inline void multiply_panel(Factors a, int64_t rows, int64_t depth, const Columns& b, float* c, int64_t c_row) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows, a.at += kRows * a.row, c += kRows * c_row)
    multiply_rows<kRows, kAdd>(a, depth, b, c, c_row);
  switch (rows - r) {
    case 5:
      return multiply_rows<5, kAdd>(a, depth, b, c, c_row);
    case 4:
      return multiply_rows<4, kAdd>(a, depth, b, c, c_row);
    case 3:
      return multiply_rows<3, kAdd>(a, depth, b, c, c_row);
    case 2:
      return multiply_rows<2, kAdd>(a, depth, b, c, c_row);
    case 1:
      return multiply_rows<1, kAdd>(a, depth, b, c, c_row);
    default:
      return;
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
