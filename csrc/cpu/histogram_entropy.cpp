// histogram_entropy on the CPU.
//
// Computes   H_r = -sum_n p log p, p = the share of row r in bin n of the range of all rows.
// A chunk    owns 16 rows, 256 elements at a time: bins are found in vector lanes, and counted one by one.
// Moves      reads x twice, once for its range.
// Accumulates counts as integers; the terms of a row in float32, bin after bin, as the usual loop over bins adds them.
#include "histogram_entropy.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "parallel.h"
#include "rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kRows = 16;
constexpr int64_t kBlock = 256;

struct Range {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();
  bool nan = false;
};

template <class T>
Range range_of(const T* x, int64_t count) {
  float low[kLanes], high[kLanes];
  int32_t nan[kLanes] = {};
  std::fill(low, low + kLanes, Range().low);
  std::fill(high, high + kLanes, Range().high);
  int64_t i = 0;
  const auto take = [&](int64_t lane, float value) {
    low[lane] = value < low[lane] ? value : low[lane];
    high[lane] = value > high[lane] ? value : high[lane];
    nan[lane] |= value != value ? 1 : 0;
  };
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) take(lane, to_float(x[i + lane]));
  }
  for (; i < count; ++i) take(0, to_float(x[i]));
  Range range;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    range.low = std::min(range.low, low[lane]);
    range.high = std::max(range.high, high[lane]);
    range.nan |= nan[lane] != 0;
  }
  return range;
}

template <bool kStrict, class T>
float row_entropy(const T* row, int64_t columns, const float* terms, Bins bins, std::vector<int64_t>& counts) {
  std::fill(counts.begin(), counts.end(), 0);
  int32_t found[kBlock];
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t size = std::min(kBlock, columns - begin);
    for (int64_t i = 0; i < size; ++i) found[i] = bins.of<kStrict>(to_float(row[begin + i]));
    for (int64_t i = 0; i < size; ++i) ++counts[static_cast<size_t>(found[i])];
  }
  float sum = 0.0f;
  for (int64_t n = 0; n < bins.count; ++n) sum += terms[counts[static_cast<size_t>(n)]];
  return sum;
}

template <class T>
int64_t entropies(const HistogramEntropyArgs& a, float* entropy) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t bytes = a.rows * a.columns * static_cast<int64_t>(sizeof(T));
  const int64_t chunks = (a.rows + kRows - 1) / kRows;
  std::vector<Range> ranges(static_cast<size_t>(chunks));
  const auto rows_of = [&](int64_t chunk) { return std::min(kRows, a.rows - chunk * kRows); };
  parallel_chunks(chunks, bytes, [&](int64_t chunk) {
    ranges[static_cast<size_t>(chunk)] = range_of(x + chunk * kRows * a.columns, rows_of(chunk) * a.columns);
  });
  Range all;
  for (const Range& range : ranges) {
    all.low = std::min(all.low, range.low);
    all.high = std::max(all.high, range.high);
    all.nan |= range.nan;
  }
  if (all.nan) all.low = std::numeric_limits<float>::quiet_NaN();
  const Bins bins(all.low, all.high, a.step, a.strict);
  if (bins.count <= 0 || bins.count > kMostBins) {
    std::fill(entropy, entropy + a.rows, bins.count == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN());
    return bins.count;
  }
  // Finding a bin costs far more than reading an element: a second thread pays earlier.
  parallel_chunks(chunks, 4 * bytes, [&](int64_t chunk) {
    std::vector<int64_t> counts(static_cast<size_t>(bins.count) + 1);
    for (int64_t r = chunk * kRows; r < chunk * kRows + rows_of(chunk); ++r) {
      const auto entropy_of = a.strict ? row_entropy<true, T> : row_entropy<false, T>;
      entropy[r] = entropy_of(x + r * a.columns, a.columns, a.terms, bins, counts);
    }
  });
  return bins.count;
}

}  // namespace

int64_t histogram_entropy(const HistogramEntropyArgs& args, float* entropy) {
  return visit_dtype(args.dtype,
                     [&](auto* type) { return entropies<std::remove_pointer_t<decltype(type)>>(args, entropy); });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
