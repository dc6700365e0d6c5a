// Losses of rows: one each, their sum or their mean.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Sum of up to a chunk of values, in float64 and by halves: one after another, 64 additions waited for each other longer
// than ten classes of a row took to compute.
inline double sum_of_chunk(const float* values, int64_t count) {
  double sums[kRowsPerChunk] = {};
  std::copy(values, values + count, sums);
  for (int64_t half = kRowsPerChunk / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// Where `each` is not null, what `body(begin, count, values)` writes for each chunk of rows; else the sum of it over all
// rows, in float64, by chunks and then in order.
template <class Body>
double sum_over_rows(int64_t rows, int64_t bytes, float* each, const Body& body) {
  if (each != nullptr) {
    parallel_chunks(row_chunks(rows), bytes, [&](int64_t chunk) {
      const int64_t begin = chunk * kRowsPerChunk;
      body(begin, std::min(kRowsPerChunk, rows - begin), each + begin);
    });
    return 0.0;
  }
  std::vector<double> partial(static_cast<size_t>(row_chunks(rows)));
  parallel_chunks(row_chunks(rows), bytes, [&](int64_t chunk) {
    const int64_t begin = chunk * kRowsPerChunk;
    const int64_t count = std::min(kRowsPerChunk, rows - begin);
    float values[kRowsPerChunk];
    body(begin, count, values);
    partial[static_cast<size_t>(chunk)] = sum_of_chunk(values, count);
  });
  double total = 0.0;
  for (double value : partial) total += value;
  return total;
}

// The sum or the mean; that of an empty batch is 0 / 0 = NaN.
inline float reduce(double total, Reduction reduction, int64_t rows) {
  return static_cast<float>(reduction == Reduction::mean ? total / static_cast<double>(rows) : total);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
