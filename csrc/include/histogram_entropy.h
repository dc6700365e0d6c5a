// histogram_entropy: the entropy of each row's histogram, over bins that all rows share.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bdfast {

struct HistogramEntropyArgs {
  const void* x;  // [rows, columns] of `dtype`, contiguous
  DType dtype;
  int64_t rows;
  int64_t columns;
  const float* terms;  // [columns + 1]: what a bin with that many elements of a row adds to its entropy, on the CPU
  double step;         // width of a bin
  bool strict;         // what lies on an edge is in no bin; otherwise bins are [edge, next edge), the last one closed
};

// Up to here a bin that is found by one multiplication is off by at most one.
constexpr int64_t kMostBins = int64_t{1} << 20;

namespace BDFAST_ISA_NAMESPACE {

// Bins of the range [low, high]. Edges are float32 sums of `low` and the product n * step, rounded once each, as PyTorch
// makes them: an element next to an edge falls where it falls there.
struct Bins {
  float low;
  float inverse;
  double step;
  int64_t count;  // -1 where the range is not finite

  BDFAST_HOST_DEVICE Bins(float lowest, float highest, double width, bool strict)
      : low(lowest), inverse(static_cast<float>(1.0 / width)), step(width) {
    const float bars = (highest - lowest) / static_cast<float>(width);
    if (!(bars <= 3.402823466e+38f)) {
      count = -1;
    } else if (bars > static_cast<float>(kMostBins)) {
      count = kMostBins + 1;
    } else {
      count = static_cast<int64_t>(bars);
      if (!strict && (static_cast<float>(count) < bars || count == 0)) ++count;
    }
  }

  BDFAST_HOST_DEVICE float edge(int32_t n) const { return low + static_cast<float>(n * step); }

  // The bin of x, or `count` for none; count >= 1. Without branches, so that loops over it vectorise.
  template <bool kStrict>
  BDFAST_HOST_DEVICE int32_t of(float x) const {
    const int32_t none = static_cast<int32_t>(count), last = none - 1;
    int32_t n = static_cast<int32_t>((x - low) * inverse);
    n = n < last ? n : last;
    const float guess = edge(n);
    n -= static_cast<int32_t>(kStrict ? x <= guess : x < guess) & static_cast<int32_t>(n > 0);
    n += static_cast<int32_t>(x >= edge(n + 1)) & static_cast<int32_t>(n < last);
    if (!kStrict) return n;
    const int32_t inside = static_cast<int32_t>(x > edge(n)) & static_cast<int32_t>(x < edge(n + 1));
    return inside != 0 ? n : none;
  }
};

}  // namespace BDFAST_ISA_NAMESPACE

// Writes `entropy` [rows] in nats, NaN where x is not finite. Returns the number of bins: -1 where x is not finite, more
// than kMostBins where there would be; nothing of use is written in that case.
BDFAST_DECLARE_CPU_KERNEL(int64_t histogram_entropy(const HistogramEntropyArgs& args, float* entropy))

}  // namespace bdfast
