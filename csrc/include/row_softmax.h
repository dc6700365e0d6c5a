// Maximum and sum of exponentials of one row, and of many narrow rows at once.
#pragma once

#include "pack.h"
#include "rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Accumulators that do not wait for each other: with one vector of them, a sum or a maximum takes an addition's latency a
// vector of the row (a row of 1,000 classes takes three times as long).
constexpr int64_t kWide = 64;

struct WideMax {
  float max;
  float poison;  // with kFinite NaN where a value is infinite or NaN, else 0
};

#ifdef __AVX512F__

// The maximum of a row, past NaNs.
template <bool kFinite, class T>
WideMax wide_row_max(const T* row, int64_t classes) {
  Pack most[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, poison[4];
  int64_t j = 0;
  for (; j + kWide <= classes; j += kWide) {
    for (int64_t k = 0; k < 4; ++k) {
      const Pack z = load_pack(row + j + k * kPack);
      most[k] = max(most[k], z);
      if (kFinite) poison[k] += z - z;
    }
  }
  for (; j < classes; j += kPack) {
    const Pack z = load_first(row + j, classes - j);
    most[0] = max(most[0], z);
    if (kFinite) poison[0] += Pack(_mm512_maskz_sub_ps(first_lanes(classes - j), z.v, z.v));
  }
  return {largest(max(max(most[0], most[1]), max(most[2], most[3]))),
          kFinite ? sum((poison[0] + poison[1]) + (poison[2] + poison[3])) : 0.0f};
}

// Sum of exp(z - max) over a row, whose terms go to `terms` with kKeep; the row that will be wanted after it, `next`, is
// fetched meanwhile: 1.07 times as fast, since nothing else reads memory here.
template <bool kKeep, class T>
float wide_row_sum(const T* row, const T* next, int64_t classes, float max, float* terms) {
  Pack sums[4];
  int64_t j = 0;
  for (; j + kWide <= classes; j += kWide) {
    prefetch<kWide>(next + j);
    for (int64_t k = 0; k < 4; ++k) {
      const Pack term = exp_nonpositive(load_pack(row + j + k * kPack) - max);
      if (kKeep) store_pack(terms + j + k * kPack, term);
      sums[k] += term;
    }
  }
  for (; j < classes; j += kPack) {
    const Pack term = exp_nonpositive(load_first(row + j, classes - j) - max);
    if (kKeep) store_first(terms + j, classes - j, term);
    sums[0] += term;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

#else

// The maximum of a row, past NaNs.
template <bool kFinite, class T>
WideMax wide_row_max(const T* row, int64_t classes) {
  static_assert(!kFinite, "rows that have to be finite are read by tiles here");
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
  return {max, 0.0f};
}

// Sum of exp(z - max) over a row, whose terms go to `terms` with kKeep.
template <bool kKeep, class T>
float wide_row_sum(const T* row, const T*, int64_t classes, float max, float* terms) {
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

#endif

// scale * exp(z - max) of a row.
template <class T>
void scaled_exponentials(const T* row, int64_t classes, float max, float scale, T* to) {
  for_packs(classes, [&](int64_t j, int64_t n) {
    store_first(to + j, n, exp_nonpositive(load_first(row + j, n) - max) * scale);
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
