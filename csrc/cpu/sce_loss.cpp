// sce_loss on the CPU.
//
// Computes   loss_i = alpha softplus(m_i) + beta |A| sigmoid(m_i), m_i = log sum_{j != y_i} exp(z_ij) - z_iy_i
//            dz_ij  = grad_i (alpha + beta |A| p_iy) (p_ij - [j = y_i]), the label's as -sigmoid(m_i)
// A chunk    owns 64 rows, and reduces them by halves; chunks are summed in order.
// Moves      forward: reads N*C, and writes as much where it makes the gradient too; backward: reads and writes N*C.
// Accumulates rows in float32, in vector lanes, losses over rows in float64.
#include "sce_loss.h"

#include <type_traits>

#include "huge_pages.h"
#include "row_reduce.h"
#include "sce_row.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

// Up to 16 rows: what is told of each, and what follows from it. Lanes without a row hold zeros.
struct Lanes {
  float max[kLanes] = {}, sum[kLanes] = {}, label[kLanes] = {};  // as in SceRows
  float weight[kLanes] = {};                                     // the derivative of the whole by the row's loss
  float loss[kLanes];
  float others[kLanes];  // what multiplies exp(z_j - max) in the gradient
  float entry[kLanes];   // the gradient of z_y
};

// Of a row in the reduced loss.
float weight_of(const SceLossArgs& a, Reduction reduction) {
  return reduction == Reduction::mean ? 1.0f / static_cast<float>(a.rows) : 1.0f;
}

// Loss and gradient from the rest.
inline void finish(const SceLossArgs& a, Lanes& rows) {
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    const SceTerms terms = sce_terms(sce_margin(rows.max[i], rows.sum[i], rows.label[i]));
    const float slope = rows.weight[i] * (a.alpha + a.reverse * terms.confidence) * terms.doubt;
    rows.loss[i] = a.alpha * terms.cross_entropy + a.reverse * terms.doubt;
    rows.others[i] = rows.sum[i] == 0.0f ? slope : slope / rows.sum[i];  // without other classes doubt is 0, or NaN
    rows.entry[i] = -slope;
  }
}

// Losses and gradients of rows [begin, begin + count), count <= kLanes, with one exponential a class. `rows` comes with
// the weights.
void narrow_rows_ahead(const SceLossArgs& a, int64_t begin, int64_t count, Lanes& rows, float* grad) {
  alignas(64) float block[kNarrow * kLanes];
  const int64_t* target = a.target + begin;
  load_transposed<kLanes>(static_cast<const float*>(a.logits) + begin * a.row_stride, a.row_stride, a.classes, count,
                          block);
  for (int64_t lane = 0; lane < count; ++lane) {
    float& labelled = block[target[lane] * kLanes + lane];
    rows.label[lane] = labelled;
    labelled = -INFINITY;
  }
  float max[kLanes], sum[kLanes] = {};
  std::fill(max, max + kLanes, -INFINITY);
  for (int64_t j = 0; j < a.classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) max[lane] = std::max(max[lane], block[j * kLanes + lane]);
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) max[lane] = shift_of(max[lane]);
  for (int64_t j = 0; j < a.classes; ++j) {
    BDFAST_PACKS
    for (int64_t lane = 0; lane < kLanes; lane += kPack) {
      float* z = block + j * kLanes + lane;
      const Pack term = exp_nonpositive(load_pack(z) - load_pack(max + lane));
      store_pack(z, term);
      store_pack(sum + lane, load_pack(sum + lane) + term);
    }
  }
  std::copy(max, max + count, rows.max);
  std::copy(sum, sum + count, rows.sum);
  finish(a, rows);
  for (int64_t j = 0; j < a.classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) block[j * kLanes + lane] *= rows.others[lane];
  }
  for (int64_t lane = 0; lane < count; ++lane) block[target[lane] * kLanes + lane] = rows.entry[lane];
  store_transposed<kLanes>(block, a.classes, count, grad);
}

// The same of wide rows, whose terms wait in the rows of the gradient, in a near cache.
void wide_rows_ahead(const SceLossArgs& a, int64_t begin, int64_t count, Lanes& rows, float* grad) {
  const float* logits = static_cast<const float*>(a.logits) + begin * a.row_stride;
  for (int64_t lane = 0; lane < count; ++lane) {
    const float* row = logits + lane * a.row_stride;
    const int64_t y = a.target[begin + lane];
    two_sided_sce_row<false, true>(row, row + a.row_stride, a.classes, y, grad + lane * a.classes, rows.max[lane],
                                   rows.sum[lane]);
    rows.label[lane] = row[y];
  }
  finish(a, rows);
  for (int64_t lane = 0; lane < count; ++lane) {
    float* row = grad + lane * a.classes;
    const float scale = rows.others[lane];
#pragma omp simd
    for (int64_t j = 0; j < a.classes; ++j) row[j] *= scale;
    row[a.target[begin + lane]] = rows.entry[lane];
  }
}

// Gradients of `count` <= kLanes narrow rows.
template <class T>
void narrow_gradients(const T* logits, int64_t stride, int64_t classes, const int64_t* target, int64_t count,
                      const Lanes& rows, T* grad) {
  alignas(64) float block[kNarrow * kLanes];
  load_transposed<kLanes>(logits, stride, classes, count, block);
  for (int64_t j = 0; j < classes; ++j) {
    BDFAST_PACKS
    for (int64_t lane = 0; lane < kLanes; lane += kPack) {
      float* z = block + j * kLanes + lane;
      store_pack(z, exp_nonpositive(load_pack(z) - load_pack(rows.max + lane)) * load_pack(rows.others + lane));
    }
  }
  for (int64_t lane = 0; lane < count; ++lane) block[target[lane] * kLanes + lane] = rows.entry[lane];
  store_transposed<kLanes>(block, classes, count, grad);
}

// The gradient of rows [begin, end) from their statistics.
template <class T>
void gradient(const SceLossArgs& a, int64_t begin, int64_t end, const float* grad_loss, int64_t grad_stride,
              float weight, const float* stats, T* grad) {
  const T* logits = static_cast<const T*>(a.logits);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t count = std::min(kLanes, end - i);
    Lanes rows;
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t row = i + lane;
      rows.max[lane] = stats[2 * row];
      rows.sum[lane] = stats[2 * row + 1];
      rows.label[lane] = to_float(logits[row * a.row_stride + a.target[row]]);
      rows.weight[lane] = grad_loss[row * grad_stride] * weight;
    }
    finish(a, rows);
    if (a.classes <= kNarrow) {
      narrow_gradients(logits + i * a.row_stride, a.row_stride, a.classes, a.target + i, count, rows,
                       grad + i * a.classes);
      continue;
    }
    for (int64_t lane = 0; lane < count; ++lane) {
      T* row = grad + (i + lane) * a.classes;
      scaled_exponentials(logits + (i + lane) * a.row_stride, a.classes, rows.max[lane], rows.others[lane], row);
      // Over the label's entry, where exp(z - max) means nothing and may have overflowed.
      store(row + a.target[i + lane], rows.entry[lane]);
    }
  }
}

// Losses and statistics of rows [begin, begin + count), at most a chunk.
template <class T>
void losses(const SceLossArgs& a, int64_t begin, int64_t count, float* values, float* stats) {
  SceRows rows;
  sce_rows<false>(static_cast<const T*>(a.logits) + begin * a.row_stride, a.row_stride, a.classes, a.target + begin,
                  count, rows);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const SceTerms terms = sce_terms(sce_margin(rows.max[i], rows.sum[i], rows.label[i]));
    values[i] = a.alpha * terms.cross_entropy + a.reverse * terms.doubt;
    stats[2 * (begin + i)] = rows.max[i];
    stats[2 * (begin + i) + 1] = rows.sum[i];
  }
}

// The same, and the gradient for an incoming gradient of 1. Half precision has no room for terms that wait.
template <class T>
void losses_ahead(const SceLossArgs& a, int64_t begin, int64_t count, float weight, float* values, float* stats,
                  T* grad) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t first = begin + i, n = std::min(kLanes, count - i);
      Lanes rows;
      std::fill(rows.weight, rows.weight + n, weight);
      if (a.classes <= kNarrow) {
        narrow_rows_ahead(a, first, n, rows, grad + first * a.classes);
      } else {
        wide_rows_ahead(a, first, n, rows, grad + first * a.classes);
      }
      std::copy(rows.loss, rows.loss + n, values + i);
      for (int64_t lane = 0; lane < n; ++lane) {
        stats[2 * (first + lane)] = rows.max[lane];
        stats[2 * (first + lane) + 1] = rows.sum[lane];
      }
    }
  } else {
    const float one = 1.0f;
    losses<T>(a, begin, count, values, stats);
    gradient(a, begin, begin + count, &one, 0, weight, stats, grad);
  }
}

template <class T>
void forward(const SceLossArgs& a, Reduction reduction, float* loss, float* stats, T* grad) {
  const int64_t bytes = a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  const float weight = weight_of(a, reduction);
  float* each = reduction == Reduction::none ? loss : nullptr;
  prefer_huge_pages(grad, bytes);
  const double total = sum_over_rows(a.rows, bytes, each, [&](int64_t begin, int64_t count, float* values) {
    if (grad == nullptr) {
      losses<T>(a, begin, count, values, stats);
    } else {
      losses_ahead(a, begin, count, weight, values, stats, grad);
    }
  });
  if (reduction != Reduction::none) *loss = reduce(total, reduction, a.rows);
}

template <class T>
void backward(const SceLossArgs& a, Reduction reduction, const float* grad_loss, const float* stats, T* grad) {
  const int64_t grad_stride = reduction == Reduction::none ? 1 : 0;
  const int64_t bytes = a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  const float weight = weight_of(a, reduction);
  prefer_huge_pages(grad, bytes);
  parallel_chunks(row_chunks(a.rows), 2 * bytes, [&](int64_t chunk) {
    const int64_t begin = chunk * kRowsPerChunk, end = std::min(a.rows, begin + kRowsPerChunk);
    gradient(a, begin, end, grad_loss, grad_stride, weight, stats, grad);
  });
}

}  // namespace

int64_t sce_loss_fwd(const SceLossArgs& args, Reduction reduction, float* loss, float* stats, void* grad_logits) {
  const int64_t outside = first_label_outside(args.target, args.rows, args.classes);
  if (outside >= 0) return outside;
  visit_dtype(args.dtype, [&](auto* element) {
    forward(args, reduction, loss, stats, static_cast<decltype(element)>(grad_logits));
  });
  return -1;
}

void sce_loss_bwd(const SceLossArgs& args, Reduction reduction, const float* grad_loss, const float* stats,
                  void* grad_logits) {
  visit_dtype(args.dtype, [&](auto* element) {
    backward(args, reduction, grad_loss, stats, static_cast<decltype(element)>(grad_logits));
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
