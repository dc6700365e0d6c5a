// hinge_cross_entropy on the CPU.
//
// Computes   loss_i = max(0, CE_i - margin), CE_i = (m_i - z_iy) + log s_i, m_i = max_j z_ij, s_i = sum_j exp(z_ij - m_i)
//            dz_ij  = grad_i * [CE_i > margin] * (exp(z_ij - m_i) / s_i - [j = y_i])
// A chunk    owns 64 rows, and reduces them in order; chunks are summed in order.
// Moves      forward: reads N*C, and writes as much where it makes the gradient too; backward: reads and writes N*C
//            (inactive rows are only written).
// Accumulates rows in float32 (a row is summed in vector lanes), losses over rows in float64.
#include "hinge_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "row_math.h"
#include "rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

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
  float max = -INFINITY;
  for (int64_t lane = 0; lane < kWide; ++lane) max = std::max(max, lane_max[lane]);
  for (int64_t j = whole; j < classes; ++j) max = std::max(max, to_float(row[j]));
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

template <class T>
void wide_row_stats(const T* row, int64_t classes, float* stats) {
  stats[0] = wide_row_max(row, classes);
  stats[1] = wide_row_sum<false>(row, classes, stats[0], nullptr);
}

template <class T>
void narrow_row_stats(const T* rows, int64_t stride, int64_t classes, float* stats) {
  float block[kNarrow * kLanes], max[kLanes], sum[kLanes];
  load_transposed<kLanes>(rows, stride, classes, kLanes, block);
  for (int64_t lane = 0; lane < kLanes; ++lane) max[lane] = -INFINITY;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] = 0.0f;
  for (int64_t j = 0; j < classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) max[lane] = std::max(max[lane], block[j * kLanes + lane]);
  }
  for (int64_t j = 0; j < classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += exp_nonpositive(block[j * kLanes + lane] - max[lane]);
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    stats[2 * lane] = max[lane];
    stats[2 * lane + 1] = sum[lane];
  }
}

// (maximum, sum of exponentials) of rows [begin, end).
template <class T>
void row_stats(const HingeCrossEntropyArgs& a, int64_t begin, int64_t end, float* stats) {
  const T* logits = static_cast<const T*>(a.logits);
  int64_t i = begin;
  if (a.classes <= kNarrow) {
    for (; i + kLanes <= end; i += kLanes)
      narrow_row_stats(logits + i * a.row_stride, a.row_stride, a.classes, stats + 2 * i);
  }
  for (; i < end; ++i) wide_row_stats(logits + i * a.row_stride, a.classes, stats + 2 * i);
}

// CE of rows [begin, end) from their statistics.
template <class T>
void row_cross_entropy(const HingeCrossEntropyArgs& a, int64_t begin, int64_t end, const float* stats, float* ce) {
  const T* logits = static_cast<const T*>(a.logits);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i)
    ce[i - begin] = (stats[2 * i] - to_float(logits[i * a.row_stride + a.target[i]])) + log_positive(stats[2 * i + 1]);
}

// The hinge is inactive only where CE <= margin is true: a NaN loss is not masked.
inline float hinge(float cross_entropy, float margin) {
  return cross_entropy <= margin ? 0.0f : cross_entropy - margin;
}

template <class T>
void wide_backward_row(const T* row, int64_t classes, float max, float scale_over_sum, T* grad) {
#pragma omp simd
  for (int64_t j = 0; j < classes; ++j) store(grad + j, scale_over_sum * exp_nonpositive(to_float(row[j]) - max));
}

template <class T>
void narrow_backward_rows(const T* rows, int64_t stride, int64_t classes, const float* stats, const float* scale,
                          T* grad) {
  float max[kLanes], scale_over_sum[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    max[lane] = stats[2 * lane];
    scale_over_sum[lane] = scale[lane] / stats[2 * lane + 1];
  }
  for (int64_t j = 0; j < classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane)
      store(grad + lane * classes + j,
            scale_over_sum[lane] * exp_nonpositive(to_float(rows[lane * stride + j]) - max[lane]));
  }
}

// Gradient rows [begin, end), at most kRowsPerChunk.
template <class T>
void backward_rows(const HingeCrossEntropyArgs& a, int64_t begin, int64_t end, const float* stats, const float* scale,
                   const bool* active, T* grad) {
  const T* logits = static_cast<const T*>(a.logits);
  int64_t i = begin;
  if (a.classes <= kNarrow) {
    for (; i + kLanes <= end; i += kLanes)
      narrow_backward_rows(logits + i * a.row_stride, a.row_stride, a.classes, stats + 2 * i, scale + (i - begin),
                           grad + i * a.classes);
  }
  for (; i < end; ++i) {
    if (active[i - begin])
      wide_backward_row(logits + i * a.row_stride, a.classes, stats[2 * i], scale[i - begin] / stats[2 * i + 1],
                        grad + i * a.classes);
  }
  for (i = begin; i < end; ++i) {
    T* row = grad + i * a.classes;
    if (!active[i - begin]) {
      std::fill(row, row + a.classes, T{});
      continue;
    }
    // The label's entry is rounded once, from float32: (p_y - 1) * scale.
    const float z = to_float(logits[i * a.row_stride + a.target[i]]);
    const float p = exp_nonpositive(z - stats[2 * i]) / stats[2 * i + 1];
    store(row + a.target[i], scale[i - begin] * (p - 1.0f));
  }
}

// Statistics, CE and the gradient of one row for an incoming gradient of `unit`, with one exponential a class: the terms
// of the sum wait for it in the row of the gradient, in the nearest cache.
float wide_row_with_gradient(const float* row, int64_t classes, int64_t target, float margin, float unit, float* stats,
                             float* grad) {
  stats[0] = wide_row_max(row, classes);
  stats[1] = wide_row_sum<true>(row, classes, stats[0], grad);
  const float cross_entropy = (stats[0] - row[target]) + log_positive(stats[1]);
  if (cross_entropy <= margin) {
    std::fill(grad, grad + classes, 0.0f);
    return cross_entropy;
  }
  const float p = grad[target] / stats[1];
  const float scale = unit / stats[1];
#pragma omp simd
  for (int64_t j = 0; j < classes; ++j) grad[j] *= scale;
  grad[target] = unit * (p - 1.0f);
  return cross_entropy;
}

// Statistics, CE and gradient of rows [begin, end), at most kRowsPerChunk.
template <class T>
void rows_with_gradient(const HingeCrossEntropyArgs& a, int64_t begin, int64_t end, float unit, float* stats, float* ce,
                        T* grad) {
  if constexpr (std::is_same_v<T, float>) {
    if (a.classes > kNarrow) {
      const float* logits = static_cast<const float*>(a.logits);
      for (int64_t i = begin; i < end; ++i)
        ce[i - begin] = wide_row_with_gradient(logits + i * a.row_stride, a.classes, a.target[i], a.margin, unit,
                                               stats + 2 * i, grad + i * a.classes);
      return;
    }
  }
  row_stats<T>(a, begin, end, stats);
  row_cross_entropy<T>(a, begin, end, stats, ce);
  float scale[kRowsPerChunk];
  bool active[kRowsPerChunk];
  for (int64_t i = 0; i < end - begin; ++i) {
    active[i] = !(ce[i] <= a.margin);
    scale[i] = unit;
  }
  backward_rows(a, begin, end, stats, scale, active, grad);
}

template <class T>
int64_t forward(const HingeCrossEntropyArgs& a, Reduction reduction, float* loss, float* stats, void* grad_logits) {
  if (const int64_t outside = first_label_outside(a.target, a.rows, a.classes); outside >= 0) return outside;
  const int64_t chunks = row_chunks(a.rows);
  std::vector<double> partial(static_cast<size_t>(chunks));
  const bool hinge_rows = !a.batch_hinge;
  const float unit = reduction == Reduction::mean ? 1.0f / static_cast<float>(a.rows) : 1.0f;
  parallel_chunks(chunks, a.rows * a.classes * static_cast<int64_t>(sizeof(T)), [&](int64_t chunk) {
    const int64_t begin = chunk * kRowsPerChunk;
    const int64_t end = std::min(a.rows, begin + kRowsPerChunk);
    float ce[kRowsPerChunk];
    if (grad_logits != nullptr) {
      rows_with_gradient(a, begin, end, unit, stats, ce, static_cast<T*>(grad_logits));
    } else {
      row_stats<T>(a, begin, end, stats);
      row_cross_entropy<T>(a, begin, end, stats, ce);
    }
    double total = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      const float value = hinge_rows ? hinge(ce[i - begin], a.margin) : ce[i - begin];
      if (reduction == Reduction::none) loss[i] = value;
      total += value;
    }
    partial[static_cast<size_t>(chunk)] = total;
  });
  if (reduction == Reduction::none) return -1;
  double total = 0.0;
  for (double value : partial) total += value;
  if (reduction == Reduction::mean) total /= static_cast<double>(a.rows);  // 0 / 0 = NaN for an empty batch
  const float reduced = static_cast<float>(total);
  *loss = hinge_rows ? reduced : hinge(reduced, a.margin);
  return -1;
}

template <class T>
void backward(const HingeCrossEntropyArgs& a, Reduction reduction, const float* grad_loss, const float* loss,
              const float* stats, void* grad_logits) {
  const int64_t chunks = row_chunks(a.rows);
  const float shared = reduction == Reduction::mean ? grad_loss[0] / static_cast<float>(a.rows) : grad_loss[0];
  const bool batch_active = a.batch_hinge && !(*loss <= 0.0f);
  parallel_chunks(chunks, 2 * a.rows * a.classes * static_cast<int64_t>(sizeof(T)), [&](int64_t chunk) {
    const int64_t begin = chunk * kRowsPerChunk;
    const int64_t end = std::min(a.rows, begin + kRowsPerChunk);
    float ce[kRowsPerChunk], scale[kRowsPerChunk];
    bool active[kRowsPerChunk];
    row_cross_entropy<T>(a, begin, end, stats, ce);
    for (int64_t i = begin; i < end; ++i) {
      active[i - begin] = a.batch_hinge ? batch_active : !(ce[i - begin] <= a.margin);
      scale[i - begin] = reduction == Reduction::none ? grad_loss[i] : shared;
    }
    backward_rows(a, begin, end, stats, scale, active, static_cast<T*>(grad_logits));
  });
}

}  // namespace

int64_t hinge_cross_entropy_fwd(const HingeCrossEntropyArgs& args, Reduction reduction, float* loss, float* stats,
                                void* grad_logits) {
  return visit_dtype(args.dtype, [&](auto* element) {
    return forward<std::remove_pointer_t<decltype(element)>>(args, reduction, loss, stats, grad_logits);
  });
}

void hinge_cross_entropy_bwd(const HingeCrossEntropyArgs& args, Reduction reduction, const float* grad_loss,
                             const float* loss, const float* stats, void* grad_logits) {
  if (args.rows == 0) return;
  visit_dtype(args.dtype, [&](auto* element) {
    backward<std::remove_pointer_t<decltype(element)>>(args, reduction, grad_loss, loss, stats, grad_logits);
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
