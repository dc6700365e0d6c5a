// hinge_cross_entropy on the CPU.
//
// Computes   loss_i = max(0, CE_i - margin), CE_i = (m_i - z_iy) + log s_i, m_i = max_j z_ij, s_i = sum_j exp(z_ij - m_i)
//            dz_ij  = grad_i * [CE_i > margin] * (exp(z_ij - m_i) / s_i - [j = y_i])
// A chunk    owns 64 rows, and reduces them in order; chunks are summed in order.
// Moves      forward: reads N*C; backward: reads and writes N*C (inactive rows are only written).
// Accumulates rows in float32 (a row is summed in vector lanes), losses over rows in float64.
#include "hinge_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "row_math.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kRowsPerChunk = 64;

struct RowStats {
  float max;
  float sum;
};

template <class T>
RowStats row_stats(const T* row, int64_t classes) {
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < classes; ++j) max = std::max(max, to_float(row[j]));
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < classes; ++j) sum += exp_nonpositive(to_float(row[j]) - max);
  return {max, sum};
}

// The hinge is inactive only where CE <= margin is true: a NaN loss is not masked.
inline float hinge(float cross_entropy, float margin) {
  return cross_entropy <= margin ? 0.0f : cross_entropy - margin;
}

template <class T>
int64_t forward(const HingeCrossEntropyArgs& a, Reduction reduction, float* loss, float* stats) {
  const T* logits = static_cast<const T*>(a.logits);
  for (int64_t i = 0; i < a.rows; ++i) {
    if (a.target[i] < 0 || a.target[i] >= a.classes) return i;
  }
  const int64_t chunks = (a.rows + kRowsPerChunk - 1) / kRowsPerChunk;
  std::vector<double> partial(static_cast<size_t>(chunks));
  const bool hinge_rows = !a.batch_hinge;
  parallel_chunks(chunks, a.rows * a.classes * static_cast<int64_t>(sizeof(T)), [&](int64_t chunk) {
    const int64_t end = std::min(a.rows, (chunk + 1) * kRowsPerChunk);
    double total = 0.0;
    for (int64_t i = chunk * kRowsPerChunk; i < end; ++i) {
      const T* row = logits + i * a.row_stride;
      const RowStats s = row_stats(row, a.classes);
      stats[2 * i] = s.max;
      stats[2 * i + 1] = s.sum;
      const float cross_entropy = (s.max - to_float(row[a.target[i]])) + std::log(s.sum);
      const float value = hinge_rows ? hinge(cross_entropy, a.margin) : cross_entropy;
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
void backward_row(const T* row, int64_t classes, int64_t target, RowStats s, float scale, T* grad) {
  const float scale_over_sum = scale / s.sum;
#pragma omp simd
  for (int64_t j = 0; j < classes; ++j) store(grad + j, scale_over_sum * exp_nonpositive(to_float(row[j]) - s.max));
  store(grad + target, scale_over_sum * exp_nonpositive(to_float(row[target]) - s.max) - scale);
}

template <class T>
void backward(const HingeCrossEntropyArgs& a, Reduction reduction, const float* grad_loss, const float* loss,
              const float* stats, void* grad_logits) {
  const T* logits = static_cast<const T*>(a.logits);
  T* grad = static_cast<T*>(grad_logits);
  const int64_t chunks = (a.rows + kRowsPerChunk - 1) / kRowsPerChunk;
  const float shared = reduction == Reduction::mean ? grad_loss[0] / static_cast<float>(a.rows) : grad_loss[0];
  const bool batch_active = a.batch_hinge && !(*loss <= 0.0f);
  parallel_chunks(chunks, 2 * a.rows * a.classes * static_cast<int64_t>(sizeof(T)), [&](int64_t chunk) {
    const int64_t end = std::min(a.rows, (chunk + 1) * kRowsPerChunk);
    for (int64_t i = chunk * kRowsPerChunk; i < end; ++i) {
      const T* row = logits + i * a.row_stride;
      const RowStats s{stats[2 * i], stats[2 * i + 1]};
      const float cross_entropy = (s.max - to_float(row[a.target[i]])) + std::log(s.sum);
      const bool active = a.batch_hinge ? batch_active : !(cross_entropy <= a.margin);
      T* out = grad + i * a.classes;
      if (!active) {
        std::fill(out, out + a.classes, T{});
        continue;
      }
      backward_row(row, a.classes, a.target[i], s, reduction == Reduction::none ? grad_loss[i] : shared, out);
    }
  });
}

}  // namespace

int64_t hinge_cross_entropy_fwd(const HingeCrossEntropyArgs& args, Reduction reduction, float* loss, float* stats) {
  switch (args.dtype) {
    case DType::float16:
      return forward<Float16>(args, reduction, loss, stats);
    case DType::bfloat16:
      return forward<BFloat16>(args, reduction, loss, stats);
    default:
      return forward<float>(args, reduction, loss, stats);
  }
}

void hinge_cross_entropy_bwd(const HingeCrossEntropyArgs& args, Reduction reduction, const float* grad_loss,
                             const float* loss, const float* stats, void* grad_logits) {
  if (args.rows == 0) return;
  switch (args.dtype) {
    case DType::float16:
      return backward<Float16>(args, reduction, grad_loss, loss, stats, grad_logits);
    case DType::bfloat16:
      return backward<BFloat16>(args, reduction, grad_loss, loss, stats, grad_logits);
    default:
      return backward<float>(args, reduction, grad_loss, loss, stats, grad_logits);
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
