// Maximum and sum of exponentials of one row, and of many narrow rows at once.
#pragma once

#include "row_math.h"
#include "rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Accumulators that do not wait for each other: with one vector of them, a sum or a maximum takes an addition's latency a
// vector of the row (a row of 1,000 classes takes three times as long).
constexpr int64_t kWide = 64;

template <class T>
float wide_row_max(const T* row, int64_t classes) {
  const int64_t whole = classes / kWide * kWide;
  float lane_max[kWide];
  std::fill(lane_max, lane_max + kWide, -INFINITY);
  for (int64_t j = 0; j < whole; j += kWide) {
#pragma omp simd
    for (int64_t lane = 0; lane < kWide; ++lane) lane_max[lane] = std::max(lane_max[lane], to_float(row[j + lane]));
  }
#pragma omp simd
  for (int64_t j = whole; j < classes; ++j) lane_max[j - whole] = std::max(lane_max[j - whole], to_float(row[j]));
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int64_t lane = 0; lane < kWide; ++lane) max = std::max(max, lane_max[lane]);
  return max;
}

// Sum of exp(z - max) over a row; the terms themselves go to `terms` where it is not null.
template <bool kKeep, class T>
float wide_row_sum(const T* row, int64_t classes, float max, float* terms) {
  const int64_t whole = classes / kWide * kWide;
  float lane_sum[kWide] = {};
  for (int64_t j = 0; j < whole; j += kWide) {
#pragma omp simd
    for (int64_t lane = 0; lane < kWide; ++lane) {
      const float term = exp_nonpositive(to_float(row[j + lane]) - max);
      if (kKeep) terms[j + lane] = term;
      lane_sum[lane] += term;
    }
  }
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t lane = 0; lane < kWide; ++lane) sum += lane_sum[lane];
#pragma omp simd reduction(+ : sum)
  for (int64_t j = whole; j < classes; ++j) {
    const float term = exp_nonpositive(to_float(row[j]) - max);
    if (kKeep) terms[j] = term;
    sum += term;
  }
  return sum;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
