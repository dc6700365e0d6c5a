// Cross entropy of rows and its gradient, for losses that bound or weigh it row by row.
//
//   CE_i = (m_i - z_iy) + log s_i,  dz_ij = weight_i (exp(z_ij - m_i) / s_i - [j = y_i]), exactly 0 in a row at rest
//
// What a loss makes of CE is its rule: `loss(ce)`, `at_rest(ce)`, true where the loss has no gradient (a NaN is not at
// rest), and `weight`, the derivative of the whole by CE of any other row.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "huge_pages.h"
#include "parallel.h"
#include "row_reduce.h"
#include "row_softmax.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// CE itself.
struct Unbounded {
  float weight;
  static float loss(float ce) { return ce; }
  static bool at_rest(float) { return false; }
};

// Rows that are computed together where C <= kNarrow.
constexpr int64_t kCrossEntropyGroup = 32;

// `count` <= kGroup narrow rows, one a vector lane: CE, (maximum, sum of exponentials), and the gradient for an incoming
// gradient of 1 where `grad` is not null, with one exponential a class.
template <int64_t kGroup, class T, class Rule>
void narrow_cross_entropy(const T* rows, int64_t stride, int64_t classes, const int64_t* target, int64_t count,
                          const Rule& rule, float* ce, float* stats, T* grad) {
  alignas(64) float block[kNarrow * kGroup], max[kGroup], sum[kGroup] = {}, label[kGroup] = {}, scale[kGroup];
  load_transposed<kGroup>(rows, stride, classes, count, block);
  for (int64_t lane = 0; lane < count; ++lane) label[lane] = block[target[lane] * kGroup + lane];
  std::fill(max, max + kGroup, -INFINITY);
  for (int64_t j = 0; j < classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kGroup; ++lane) max[lane] = std::max(max[lane], block[j * kGroup + lane]);
  }
  for (int64_t j = 0; j < classes; ++j) {
    BDFAST_PACKS
    for (int64_t lane = 0; lane < kGroup; lane += kPack) {
      const Pack term = exp_nonpositive(load_pack(block + j * kGroup + lane) - load_pack(max + lane));
      store_pack(block + j * kGroup + lane, term);
      store_pack(sum + lane, load_pack(sum + lane) + term);
    }
  }
#pragma omp simd
  for (int64_t lane = 0; lane < kGroup; ++lane) label[lane] = (max[lane] - label[lane]) + log_positive(sum[lane]);
  std::copy(label, label + count, ce);
  for (int64_t lane = 0; lane < count; ++lane) stats[2 * lane] = max[lane], stats[2 * lane + 1] = sum[lane];
  if (grad == nullptr) return;
  for (int64_t lane = 0; lane < kGroup; ++lane)
    scale[lane] = rule.at_rest(label[lane]) ? 0.0f : rule.weight / sum[lane];
  for (int64_t lane = 0; lane < count; ++lane) label[lane] = block[target[lane] * kGroup + lane];
  for (int64_t j = 0; j < classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kGroup; ++lane) block[j * kGroup + lane] *= scale[lane];
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    const float entry = rule.weight * (label[lane] / sum[lane] - 1.0f);
    block[target[lane] * kGroup + lane] = rule.at_rest(ce[lane]) ? 0.0f : entry;
  }
  store_transposed<kGroup>(block, classes, count, grad);
}

// (maximum, sum of exponentials) of one row; `next` is read after it.
template <class T>
void wide_row_stats(const T* row, const T* next, int64_t classes, float* stats) {
  stats[0] = wide_row_max<false>(row, classes).max;
  stats[1] = wide_row_sum<false>(row, next, classes, stats[0], nullptr);
}

// CE of `count` rows from their statistics.
template <class T>
void cross_entropy_of(const T* rows, int64_t stride, const int64_t* target, int64_t count, const float* stats,
                      float* ce) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    ce[i] = (stats[2 * i] - to_float(rows[i * stride + target[i]])) + log_positive(stats[2 * i + 1]);
}

// The gradient of one row from its statistics.
template <class T>
void wide_gradient(const T* row, int64_t classes, int64_t target, const float* stats, float weight, T* grad) {
  const float max = stats[0];
  scaled_exponentials(row, classes, max, weight / stats[1], grad);
  // The label's entry is rounded once, from float32: (p_y - 1) * weight.
  const float p = exp_alone(to_float(row[target]) - max) / stats[1];
  store(grad + target, weight * (p - 1.0f));
}

// One row and its gradient. In float32 the terms of the sum wait for it in the row of the gradient, in the nearest cache.
template <class T, class Rule>
float wide_cross_entropy(const T* row, const T* next, int64_t classes, int64_t target, const Rule& rule, float* stats,
                         T* grad) {
  constexpr bool keep = std::is_same_v<T, float>;
  float ce;
  if constexpr (keep) {
    stats[0] = wide_row_max<false>(row, classes).max;
    stats[1] = wide_row_sum<true>(row, next, classes, stats[0], grad);
    ce = (stats[0] - row[target]) + log_positive(stats[1]);
  } else {
    wide_row_stats(row, next, classes, stats);
    cross_entropy_of(row, 0, &target, 1, stats, &ce);
  }
  if (rule.at_rest(ce)) {
    std::fill(grad, grad + classes, T{});
  } else if constexpr (keep) {
    const float p = grad[target] / stats[1], scale = rule.weight / stats[1];
#pragma omp simd
    for (int64_t j = 0; j < classes; ++j) grad[j] *= scale;
    grad[target] = rule.weight * (p - 1.0f);
  } else {
    wide_gradient(row, classes, target, stats, rule.weight, grad);
  }
  return ce;
}

// Sum over rows of `rule.loss` in float64, or the losses themselves where `each` is not null; the gradient for an
// incoming gradient of 1 goes to `grad` where that is not null. `stats` [N, 2] = (maximum, sum of exp(z - maximum)).
template <class T, class Rule>
double sum_cross_entropy(const LabelledRows& a, const Rule& rule, float* each, float* stats, T* grad) {
  const T* logits = static_cast<const T*>(a.logits);
  const int64_t bytes = a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(grad, bytes);
  return sum_over_rows(a.rows, bytes, each, [&](int64_t begin, int64_t count, float* values) {
    const T* z = logits + begin * a.row_stride;
    const int64_t* target = a.target + begin;
    float* row_stats = stats + 2 * begin;
    T* dz = grad == nullptr ? nullptr : grad + begin * a.classes;
    if (a.classes <= kNarrow) {
      constexpr int64_t group = kCrossEntropyGroup;
      for (int64_t i = 0; i < count; i += group)
        narrow_cross_entropy<group>(z + i * a.row_stride, a.row_stride, a.classes, target + i,
                                    std::min(group, count - i), rule, values + i, row_stats + 2 * i,
                                    dz == nullptr ? nullptr : dz + i * a.classes);
    } else if (dz != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        const T* row = z + i * a.row_stride;
        values[i] = wide_cross_entropy(row, row + a.row_stride, a.classes, target[i], rule, row_stats + 2 * i,
                                       dz + i * a.classes);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const T* row = z + i * a.row_stride;
        wide_row_stats(row, row + a.row_stride, a.classes, row_stats + 2 * i);
      }
      cross_entropy_of(z, a.row_stride, target, count, row_stats, values);
    }
    for (int64_t i = 0; i < count; ++i) values[i] = rule.loss(values[i]);
  });
}

// Gradients of `count` <= kLanes narrow rows from their statistics.
template <class T>
void narrow_gradients(const T* rows, int64_t stride, int64_t classes, const int64_t* target, int64_t count,
                      const float* stats, const float* weight, T* grad) {
  alignas(64) float block[kNarrow * kLanes], max[kLanes] = {}, scale[kLanes] = {};
  load_transposed<kLanes>(rows, stride, classes, count, block);
  for (int64_t lane = 0; lane < count; ++lane) {
    max[lane] = stats[2 * lane];
    scale[lane] = weight[lane] / stats[2 * lane + 1];
  }
  for (int64_t j = 0; j < classes; ++j) {
    BDFAST_PACKS
    for (int64_t lane = 0; lane < kLanes; lane += kPack) {
      float* z = block + j * kLanes + lane;
      store_pack(z, exp_nonpositive(load_pack(z) - load_pack(max + lane)) * load_pack(scale + lane));
    }
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    const float z = to_float(rows[lane * stride + target[lane]]);
    const float p = exp_alone(z - stats[2 * lane]) / stats[2 * lane + 1];
    block[target[lane] * kLanes + lane] = weight[lane] * (p - 1.0f);
  }
  store_transposed<kLanes>(block, classes, count, grad);
}

// The gradient from the statistics of a forward. The incoming gradients lie `grad_stride` apart: 0 where all rows share
// one.
template <class T, class Rule>
void cross_entropy_gradient(const LabelledRows& a, const Rule& rule, const float* grad_loss, int64_t grad_stride,
                            const float* stats, T* grad) {
  const T* logits = static_cast<const T*>(a.logits);
  const int64_t bytes = a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(grad, bytes);
  parallel_chunks(row_chunks(a.rows), 2 * bytes, [&](int64_t chunk) {
    const int64_t end = std::min(a.rows, (chunk + 1) * kRowsPerChunk);
    for (int64_t i = chunk * kRowsPerChunk; i < end; i += kLanes) {
      const int64_t count = std::min(kLanes, end - i);
      const T* rows = logits + i * a.row_stride;
      float ce[kLanes], weight[kLanes];
      cross_entropy_of(rows, a.row_stride, a.target + i, count, stats + 2 * i, ce);
      for (int64_t lane = 0; lane < count; ++lane) weight[lane] = grad_loss[(i + lane) * grad_stride] * rule.weight;
      if (a.classes <= kNarrow)
        narrow_gradients(rows, a.row_stride, a.classes, a.target + i, count, stats + 2 * i, weight,
                         grad + i * a.classes);
      for (int64_t lane = 0; lane < count; ++lane) {
        T* row = grad + (i + lane) * a.classes;
        if (rule.at_rest(ce[lane])) {
          std::fill(row, row + a.classes, T{});
        } else if (a.classes > kNarrow) {
          wide_gradient(rows + lane * a.row_stride, a.classes, a.target[i + lane], stats + 2 * (i + lane), weight[lane],
                        row);
        }
      }
    }
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
