// Losses of rows: one each, their sum or their mean.
#pragma once

#include <vector>

#include "parallel.h"
#include "rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Sum over rows of what `body(begin, count, values)` writes for each chunk of rows, in float64 and in order; the values
// themselves go to `each` where it is not null.
template <class Body>
double sum_over_rows(int64_t rows, int64_t bytes, float* each, const Body& body) {
  std::vector<double> partial(static_cast<size_t>(row_chunks(rows)));
  parallel_chunks(row_chunks(rows), bytes, [&](int64_t chunk) {
    const int64_t begin = chunk * kRowsPerChunk;
    const int64_t count = std::min(kRowsPerChunk, rows - begin);
    float values[kRowsPerChunk];
    body(begin, count, values);
    double total = 0.0;
    for (int64_t i = 0; i < count; ++i) total += values[i];
    if (each != nullptr) std::copy(values, values + count, each + begin);
    partial[static_cast<size_t>(chunk)] = total;
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
