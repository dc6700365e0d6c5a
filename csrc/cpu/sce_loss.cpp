// sce_loss on the CPU.
//
// Computes   loss_i = alpha softplus(m_i) + beta |A| sigmoid(m_i), m_i = log sum_{j != y_i} exp(z_ij) - z_iy_i
//            dz_ij  = grad_i (alpha + beta |A| p_iy) (p_ij - [j = y_i]), the label's as -sigmoid(m_i)
// A chunk    owns 64 rows, and reduces them by halves; chunks are summed in order.
// Moves      forward: reads N*C; backward: reads and writes N*C.
// Accumulates rows in float32, in vector lanes, losses over rows in float64.
#include "sce_loss.h"

#include <type_traits>

#include "huge_pages.h"
#include "row_reduce.h"
#include "row_softmax.h"
#include "sce_row.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

template <class T>
void forward(const SceLossArgs& a, Reduction reduction, float* loss, float* stats) {
  const T* logits = static_cast<const T*>(a.logits);
  const int64_t bytes = a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  float* each = reduction == Reduction::none ? loss : nullptr;
  const double total = sum_over_rows(a.rows, bytes, each, [&](int64_t begin, int64_t count, float* values) {
    SceRows rows;
    sce_rows<false>(logits + begin * a.row_stride, a.row_stride, a.classes, a.target + begin, count, rows);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const SceTerms terms = sce_terms(sce_margin(rows.max[i], rows.sum[i], rows.label[i]));
      values[i] = a.alpha * terms.cross_entropy + a.reverse * terms.doubt;
      stats[2 * (begin + i)] = rows.max[i];
      stats[2 * (begin + i) + 1] = rows.sum[i];
    }
  });
  if (reduction != Reduction::none) *loss = reduce(total, reduction, a.rows);
}

// What multiplies exp(z_j - max) in the gradient, and the gradient of the label's logit, for up to 16 rows.
struct Scales {
  float others[kLanes];
  float label[kLanes];
};

template <class T>
void scales(const SceLossArgs& a, int64_t begin, int64_t count, const float* grad, int64_t grad_stride, float factor,
            const float* stats, Scales& out) {
  const T* logits = static_cast<const T*>(a.logits);
#pragma omp simd
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t i = begin + lane;
    const float max = stats[2 * i], sum = stats[2 * i + 1];
    const SceTerms terms = sce_terms(sce_margin(max, sum, to_float(logits[i * a.row_stride + a.target[i]])));
    const float weight = grad[i * grad_stride] * factor * (a.alpha + a.reverse * terms.confidence) * terms.doubt;
    out.others[lane] = sum == 0.0f ? weight : weight / sum;  // without other classes doubt is 0, or NaN
    out.label[lane] = -weight;
  }
}

template <class T>
void narrow_backward(const T* rows, int64_t stride, int64_t classes, const float* stats, const Scales& scale, T* grad) {
  float block[kNarrow * kLanes], max[kLanes];
  T result[kNarrow * kLanes];
  load_transposed<kLanes>(rows, stride, classes, kLanes, block);
  for (int64_t lane = 0; lane < kLanes; ++lane) max[lane] = stats[2 * lane];
  for (int64_t j = 0; j < classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane)
      store(result + j * kLanes + lane, scale.others[lane] * exp_nonpositive(block[j * kLanes + lane] - max[lane]));
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int64_t j = 0; j < classes; ++j) grad[lane * classes + j] = result[j * kLanes + lane];
  }
}

template <class T>
void backward(const SceLossArgs& a, Reduction reduction, const float* grad_loss, const float* stats, T* grad) {
  const T* logits = static_cast<const T*>(a.logits);
  const float factor = reduction == Reduction::mean ? 1.0f / static_cast<float>(a.rows) : 1.0f;
  const int64_t grad_stride = reduction == Reduction::none ? 1 : 0;
  const int64_t bytes = a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(grad, bytes);
  parallel_chunks(row_chunks(a.rows), 2 * bytes, [&](int64_t chunk) {
    const int64_t end = std::min(a.rows, (chunk + 1) * kRowsPerChunk);
    Scales scale;
    for (int64_t i = chunk * kRowsPerChunk; i < end; i += kLanes) {
      const int64_t count = std::min(kLanes, end - i);
      scales<T>(a, i, count, grad_loss, grad_stride, factor, stats, scale);
      const T* rows = logits + i * a.row_stride;
      if (a.classes <= kNarrow && count == kLanes) {
        narrow_backward(rows, a.row_stride, a.classes, stats + 2 * i, scale, grad + i * a.classes);
      } else {
        for (int64_t lane = 0; lane < count; ++lane)
          scaled_exponentials(rows + lane * a.row_stride, a.classes, stats[2 * (i + lane)], scale.others[lane],
                              grad + (i + lane) * a.classes);
      }
      // Over the label's entry, where exp(z - max) means nothing and may have overflowed.
      for (int64_t lane = 0; lane < count; ++lane)
        store(grad + (i + lane) * a.classes + a.target[i + lane], scale.label[lane]);
    }
  });
}

}  // namespace

int64_t sce_loss_fwd(const SceLossArgs& args, Reduction reduction, float* loss, float* stats) {
  const int64_t outside = first_label_outside(args.target, args.rows, args.classes);
  if (outside >= 0) return outside;
  visit_dtype(args.dtype,
              [&](auto* element) { forward<std::remove_pointer_t<decltype(element)>>(args, reduction, loss, stats); });
  return -1;
}

void sce_loss_bwd(const SceLossArgs& args, Reduction reduction, const float* grad_loss, const float* stats,
                  void* grad_logits) {
  visit_dtype(args.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    backward<T>(args, reduction, grad_loss, stats, static_cast<T*>(grad_logits));
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
