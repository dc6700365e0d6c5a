// Symmetric cross entropy of one row, through its margin m = logsumexp(z_j, j != y) - z_y.
//
// With m everything is exact for confident rows, where 1 - p_y is far below a float32 rounding of p_y:
//   1 - p_y = sigmoid(m),  CE = -log p_y = softplus(m),  RCE = |A| (1 - p_y)
#pragma once

#include "pack.h"
#include "row_softmax.h"
#include "rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Of the rows of a chunk: the maximum over j != y (0 where there is none above -inf), the sum of exp(z_j - max) over j != y,
// and z_y. The sum is NaN where a logit is NaN or +inf, and with kFinite also where one is -inf.
struct SceRows {
  float max[kRowsPerChunk];
  float sum[kRowsPerChunk];
  float label[kRowsPerChunk];
};

inline float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

template <bool kFinite>
inline float poison(float z) {
  return kFinite ? z - z : 0.0f;  // NaN for infinities and NaN
}

#ifdef __AVX512F__

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC's own AVX-512 header: operands that are not used
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// The labels of 16 rows; -1 for those of `count` that are not there.
inline __m512i load_labels(const int64_t* target, int64_t count) {
  const __m512i none = _mm512_set1_epi64(-1);
  const __mmask16 there = first_lanes(count);
  const __m512i low = _mm512_mask_loadu_epi64(none, static_cast<__mmask8>(there), target);
  const __m512i high = _mm512_mask_loadu_epi64(none, static_cast<__mmask8>(there >> 8), target + 8);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high), 1);
}

// `count` <= kGroup rows at once, one a vector lane. The label's logit is told by masks, and everything but the block stays
// in registers, those of four packs, of which one waits while another computes.
template <bool kFinite, int64_t kGroup, class T>
void narrow_sce_rows(const T* rows, int64_t stride, int64_t classes, const int64_t* target, int64_t count,
                     float* max_out, float* sum_out, float* label_out) {
  constexpr int64_t kPacks = kGroup / kPack;
  alignas(64) float block[kNarrow * kGroup];
  load_transposed<kGroup>(rows, stride, classes, count, block);
  const __m512 zero = _mm512_setzero_ps();
  __m512i labels[kPacks];
  __m512 max[kPacks], label[kPacks], sum[kPacks];
#pragma GCC unroll 4
  for (int64_t g = 0; g < kPacks; ++g) {
    labels[g] = load_labels(target + g * kPack, count - g * kPack);
    max[g] = _mm512_set1_ps(-INFINITY);
    label[g] = sum[g] = zero;
  }
  for (int64_t j = 0; j < classes; ++j) {
#pragma GCC unroll 4
    for (int64_t g = 0; g < kPacks; ++g) {
      const __m512 z = _mm512_load_ps(block + j * kGroup + g * kPack);
      const __mmask16 other = _mm512_cmpneq_epi32_mask(labels[g], _mm512_set1_epi32(static_cast<int>(j)));
      label[g] = _mm512_mask_mov_ps(z, other, label[g]);
      max[g] = _mm512_mask_max_ps(max[g], other, z, max[g]);   // the old one where z is NaN
      if (kFinite) sum[g] = _mm512_fmadd_ps(z, zero, sum[g]);  // NaN for infinities and NaN, else 0
    }
  }
#pragma GCC unroll 4
  for (int64_t g = 0; g < kPacks; ++g)
    max[g] = _mm512_mask_mov_ps(max[g], _mm512_cmp_ps_mask(max[g], _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ), zero);
  for (int64_t j = 0; j < classes; ++j) {
#pragma GCC unroll 4
    for (int64_t g = 0; g < kPacks; ++g) {
      const __m512 z = _mm512_load_ps(block + j * kGroup + g * kPack);
      const __mmask16 other = _mm512_cmpneq_epi32_mask(labels[g], _mm512_set1_epi32(static_cast<int>(j)));
      sum[g] = _mm512_mask_add_ps(sum[g], other, sum[g], exp_nonpositive(Pack(_mm512_sub_ps(z, max[g]))).v);
    }
  }
#pragma GCC unroll 4
  for (int64_t g = 0; g < kPacks; ++g) {
    store_first(max_out + g * kPack, count - g * kPack, max[g]);
    store_first(sum_out + g * kPack, count - g * kPack, sum[g]);
    store_first(label_out + g * kPack, count - g * kPack, label[g]);
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#else

// `count` <= kGroup rows at once, one a vector lane. Four vectors of rows together hide what one waits for: the moves
// into the block, which are narrower than the loads from it, and the chains of additions.
template <bool kFinite, int64_t kGroup, class T>
void narrow_sce_rows(const T* rows, int64_t stride, int64_t classes, const int64_t* target, int64_t count,
                     float* max_out, float* sum_out, float* label) {
  alignas(64) float block[kNarrow * kGroup], bad[kGroup] = {}, max[kGroup], sum[kGroup];
  load_transposed<kGroup>(rows, stride, classes, count, block);
  if (kFinite) {
    for (int64_t j = 0; j < classes; ++j) {
#pragma omp simd
      for (int64_t lane = 0; lane < kGroup; ++lane) bad[lane] += poison<kFinite>(block[j * kGroup + lane]);
    }
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    float& labelled = block[target[lane] * kGroup + lane];
    label[lane] = labelled;
    labelled = -INFINITY;
  }
  for (int64_t lane = 0; lane < kGroup; ++lane) max[lane] = -INFINITY;
  for (int64_t j = 0; j < classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kGroup; ++lane) max[lane] = std::max(max[lane], block[j * kGroup + lane]);
  }
  for (int64_t lane = 0; lane < kGroup; ++lane) {
    max[lane] = shift_of(max[lane]);
    sum[lane] = bad[lane];
  }
  for (int64_t j = 0; j < classes; ++j) {
    BDFAST_PACKS
    for (int64_t lane = 0; lane < kGroup; lane += kPack) {
      const Pack term = exp_nonpositive(load_pack(block + j * kGroup + lane) - load_pack(max + lane));
      store_pack(sum + lane, load_pack(sum + lane) + term);
    }
  }
  std::copy(max, max + count, max_out);
  std::copy(sum, sum + count, sum_out);
}

#endif

// (max, sum) of `b` joined to `a`: sums of disjoint sets of classes.
inline void merge(float& max, float& sum, float max_b, float sum_b) {
  if (sum_b == 0.0f) return;
  const float top = sum == 0.0f ? max_b : std::max(max, max_b);
  sum = (sum == 0.0f ? 0.0f : sum * exp_nonpositive(max - top)) + sum_b * exp_nonpositive(max_b - top);
  max = top;
}

// (maximum, sum of exponentials) over the classes on both sides of y, as SceRows has them; `y` outside [0, classes) excludes
// nothing. The terms of the sum go to `terms` with kKeep; `next` is the row that will be wanted after this one.
template <bool kFinite, bool kKeep, class T>
void two_sided_sce_row(const T* row, const T* next, int64_t classes, int64_t y, float* terms, float& max, float& sum) {
  const bool inside = y >= 0 && y < classes;
  const int64_t before = inside ? y : classes, after = inside ? y + 1 : classes, rest = classes - after;
  const WideMax left = wide_row_max<kFinite>(row, before), right = wide_row_max<kFinite>(row + after, rest);
  max = shift_of(std::max(left.max, right.max));
  sum = wide_row_sum<kKeep>(row, next, before, max, terms);
  sum += wide_row_sum<kKeep>(row + after, next + after, rest, max, kKeep ? terms + after : nullptr);
  sum += left.poison + right.poison;
}

#ifdef __AVX512F__

// One row, of which `label` is told where `y` is a class.
template <bool kFinite, class T>
void wide_sce_row(const T* row, const T* next, int64_t classes, int64_t y, float& max, float& sum, float& label) {
  two_sided_sce_row<kFinite, false>(row, next, classes, y, nullptr, max, sum);
  if (y >= 0 && y < classes) label = to_float(row[y]);
}

#else

constexpr int64_t kTile = 2048;  // classes that are held in L1, as float32, while they are read twice

// The same, a tile of classes at a time: 0.7 to 0.9 of the time of two sides with AVX2, where with AVX-512 it takes 1.1 to
// 1.3 times as long for 1,000 classes and three times for 20,000.
template <bool kFinite, class T>
void wide_sce_row(const T* row, const T*, int64_t classes, int64_t y, float& max_out, float& sum_out, float& label) {
  alignas(64) float tile[kTile];
  float row_max = 0.0f, row_sum = 0.0f;
  for (int64_t begin = 0; begin < classes; begin += kTile) {
    const int64_t count = std::min(kTile, classes - begin);
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    float bad = 0.0f;
#pragma omp simd reduction(+ : bad)
    for (int64_t j = 0; j < count; ++j) {
      tile[j] = to_float(row[begin + j]);
      bad += poison<kFinite>(tile[j]);
    }
    for (int64_t j = count; j < vectors * kLanes; ++j) tile[j] = -INFINITY;
    if (y >= begin && y < begin + count) {
      label = tile[y - begin];
      tile[y - begin] = -INFINITY;
    }
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int64_t j = 0; j < vectors * kLanes; ++j) max = std::max(max, tile[j]);
    max = shift_of(max);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < vectors * kLanes; ++j) sum += exp_nonpositive(tile[j] - max);
    merge(row_max, row_sum, max, bad + sum);
  }
  max_out = row_max;
  sum_out = row_sum;
}

#endif

// Rows [0, count), at most a chunk.
template <bool kFinite, class T>
void sce_rows(const T* rows, int64_t stride, int64_t classes, const int64_t* target, int64_t count, SceRows& out) {
  if (classes > kNarrow) {
    for (int64_t i = 0; i < count; ++i) {
      const T* row = rows + i * stride;
      wide_sce_row<kFinite>(row, row + stride, classes, target[i], out.max[i], out.sum[i], out.label[i]);
    }
  } else if (count == kRowsPerChunk) {
    narrow_sce_rows<kFinite, kRowsPerChunk>(rows, stride, classes, target, count, out.max, out.sum, out.label);
  } else {
    for (int64_t i = 0; i < count; i += kLanes)
      narrow_sce_rows<kFinite, kLanes>(rows + i * stride, stride, classes, target + i, std::min(kLanes, count - i),
                                       out.max + i, out.sum + i, out.label + i);
  }
}

// m, as the maths has it: -inf where no other class has weight, NaN where z_y is +inf or all logits are -inf.
inline float sce_margin(float max, float sum, float label) {
  const float others = (max - label) + log_positive(sum);
  const float none = label == -INFINITY ? NAN : -INFINITY;
  const float margin = sum == 0.0f ? none : others;
  return label == INFINITY ? NAN : margin;
}

// m for ranking, from sums taken with kFinite: a row that is not finite comes last.
inline float sce_key(float max, float sum, float label) {
  const float margin = sce_margin(max, sum, label);
  return margin == margin ? margin : INFINITY;
}

struct SceTerms {
  float cross_entropy;  // softplus(m)
  float doubt;          // 1 - p_y = sigmoid(m)
  float confidence;     // p_y
};

inline SceTerms sce_terms(float margin) {
  const float e = exp_nonpositive(-std::fabs(margin));
  const float small = e / (1.0f + e), large = 1.0f / (1.0f + e);
  const bool wrong = margin > 0.0f;
  return {(wrong ? margin : 0.0f) + log1p_unit(e), wrong ? large : small, wrong ? small : large};
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
