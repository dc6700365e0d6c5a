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

#include "parallel.h"
#include "row_reduce.h"
#include "row_softmax.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

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
  const bool hinge_rows = !a.batch_hinge;
  const float unit = reduction == Reduction::mean ? 1.0f / static_cast<float>(a.rows) : 1.0f;
  const int64_t bytes = a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  float* rows = reduction == Reduction::none ? loss : nullptr;
  const double total = sum_over_rows(a.rows, bytes, rows, [&](int64_t begin, int64_t count, float* values) {
    if (grad_logits != nullptr) {
      rows_with_gradient(a, begin, begin + count, unit, stats, values, static_cast<T*>(grad_logits));
    } else {
      row_stats<T>(a, begin, begin + count, stats);
      row_cross_entropy<T>(a, begin, begin + count, stats, values);
    }
    for (int64_t i = 0; hinge_rows && i < count; ++i) values[i] = hinge(values[i], a.margin);
  });
  if (reduction == Reduction::none) return -1;
  const float reduced = reduce(total, reduction, a.rows);
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
