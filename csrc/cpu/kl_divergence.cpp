// kl_divergence on the CPU.
//
// Computes   KL_i = sum_j p (d - 1) + q, d = log p - log q: terms >= 0 of which the small ones come from a series
//            dq_ij = grad_i (q - p), dp_ij = grad_i p (d - KL_i)
// A chunk    owns 64 rows, and reduces them in order; chunks are summed in order.
// Moves      forward: reads 2*N*C once (again from L1); backward: reads 2*N*C, writes N*C for each gradient wanted.
// Accumulates rows in float32, in vector lanes, losses over rows in float64.
#include "kl_divergence.h"

#include <type_traits>
#include <vector>

#include "huge_pages.h"
#include "row_reduce.h"
#include "row_softmax.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kStats = 5;  // (maximum, sum) of p, (maximum, sum) of q, KL

// Rows that are computed together where C <= kNarrow.
constexpr int64_t kNarrowGroup = 32;

// p (d - 1) + q = p (d + exp(-d) - 1) >= 0, up to a factor that p and q share. For |d| < 1/2, where that cancels, by the
// polynomial of degree 7 in d whose largest relative error there is the least, 2.4e-8. Where p = 0 it is q, whatever d:
// infinite or NaN, d becomes the lowest number, which the maximum below keeps apart from p * NaN.
inline float kl_term(float p, float q, float d) {
  constexpr float lowest = -3.402823466e+38f;
  const float finite = d > lowest ? d : lowest;
  const float square = d * d;
  float series = -1.98756289e-4f;
  series = series * d + 1.39819970e-3f;
  series = series * d - 8.33345217e-3f;
  series = series * d + 4.16657960e-2f;
  series = series * d - 1.66666655e-1f;
  series = series * d + 0.5f;
  const float near = p * square * series;
  const float far = p * finite + (q - p);
  return square < 0.25f ? near : far;
}

inline float log_ratio(float sum_p, float sum_q) { return log_positive(sum_p) - log_positive(sum_q); }

// exp(z - maximum) of kWidth classes of both rows and the differences of z - maximum, added to sums in lanes of their own.
template <int64_t kWidth, class T>
inline void add_classes(const T* p, const T* q, float max_p, float max_q, float* terms_p, float* terms_q, float* below,
                        float* sum_p, float* sum_q) {
#pragma omp simd
  for (int64_t j = 0; j < kWidth; ++j) {
    const float below_p = to_float(p[j]) - max_p, below_q = to_float(q[j]) - max_q;
    const float term_p = exp_nonpositive(below_p), term_q = exp_nonpositive(below_q);
    terms_p[j] = term_p;
    terms_q[j] = term_q;
    below[j] = below_p - below_q;
    sum_p[j] += term_p;
    sum_q[j] += term_q;
  }
}

inline float add_lanes(const float* lanes) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t lane = 0; lane < kWide; ++lane) sum += lanes[lane];
  return sum;
}

// KL of a row, and its (maximum, sum)s; `scratch` has room for 3 times the classes, rounded up to whole vectors.
template <class T>
float wide_row(const T* p, const T* q, int64_t classes, float* scratch, float* stats) {
  const int64_t padded = (classes + kLanes - 1) / kLanes * kLanes, whole = classes / kWide * kWide;
  float *terms_p = scratch, *terms_q = scratch + padded, *below = scratch + 2 * padded;
  const float max_p = wide_row_max(p, classes), max_q = wide_row_max(q, classes);
  alignas(64) float sums_p[kWide] = {}, sums_q[kWide] = {}, sums[kWide] = {};
  for (int64_t j = 0; j < whole; j += kWide)
    add_classes<kWide>(p + j, q + j, max_p, max_q, terms_p + j, terms_q + j, below + j, sums_p, sums_q);
  // The classes that are left, and -inf up to a whole vector, which adds nothing to any sum.
  alignas(64) float tail_p[kWide], tail_q[kWide];
  for (int64_t j = whole; j < classes; ++j) tail_p[j - whole] = to_float(p[j]), tail_q[j - whole] = to_float(q[j]);
  for (int64_t j = classes; j < padded; ++j) tail_p[j - whole] = tail_q[j - whole] = -INFINITY;
  for (int64_t j = whole; j < padded; j += kLanes)
    add_classes<kLanes>(tail_p + (j - whole), tail_q + (j - whole), max_p, max_q, terms_p + j, terms_q + j, below + j,
                        sums_p, sums_q);
  const float sum_p = add_lanes(sums_p), sum_q = add_lanes(sums_q);
  const float ratio = log_ratio(sum_p, sum_q), share = sum_p / sum_q;
  for (int64_t j = 0; j < whole; j += kWide) {
#pragma omp simd
    for (int64_t lane = 0; lane < kWide; ++lane)
      sums[lane] += kl_term(terms_p[j + lane], terms_q[j + lane] * share, below[j + lane] - ratio);
  }
  for (int64_t j = whole; j < padded; j += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane)
      sums[lane] += kl_term(terms_p[j + lane], terms_q[j + lane] * share, below[j + lane] - ratio);
  }
  stats[0] = max_p, stats[1] = sum_p, stats[2] = max_q, stats[3] = sum_q;
  return add_lanes(sums) / sum_p;
}

// The same of `count` <= kGroup rows, one a vector lane.
template <int64_t kGroup, class T>
void narrow_rows(const T* p, const T* q, const KlDivergenceArgs& a, int64_t count, float* stats, float* kl) {
  // Of each class: z of p, then d; z of q, then exp(z - maximum) of q; exp(z - maximum) of p.
  alignas(64) float block_d[kNarrow * kGroup], block_q[kNarrow * kGroup], block_p[kNarrow * kGroup];
  alignas(64) float max_p[kGroup], max_q[kGroup], sum_p[kGroup] = {}, sum_q[kGroup] = {}, sum[kGroup] = {};
  alignas(64) float ratio[kGroup], share[kGroup];
  load_transposed<kGroup>(p, a.stride_p, a.classes, count, block_d);
  load_transposed<kGroup>(q, a.stride_q, a.classes, count, block_q);
  std::fill(max_p, max_p + kGroup, -INFINITY);
  std::fill(max_q, max_q + kGroup, -INFINITY);
  for (int64_t j = 0; j < a.classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      max_p[lane] = std::max(max_p[lane], block_d[j * kGroup + lane]);
      max_q[lane] = std::max(max_q[lane], block_q[j * kGroup + lane]);
    }
  }
  for (int64_t j = 0; j < a.classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const float below_p = block_d[j * kGroup + lane] - max_p[lane],
                  below_q = block_q[j * kGroup + lane] - max_q[lane];
      const float term_p = exp_nonpositive(below_p), term_q = exp_nonpositive(below_q);
      sum_p[lane] += term_p;
      sum_q[lane] += term_q;
      block_p[j * kGroup + lane] = term_p;
      block_q[j * kGroup + lane] = term_q;
      block_d[j * kGroup + lane] = below_p - below_q;
    }
  }
#pragma omp simd
  for (int64_t lane = 0; lane < kGroup; ++lane) {
    ratio[lane] = log_ratio(sum_p[lane], sum_q[lane]);
    share[lane] = sum_p[lane] / sum_q[lane];
  }
  for (int64_t j = 0; j < a.classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const int64_t at = j * kGroup + lane;
      sum[lane] += kl_term(block_p[at], block_q[at] * share[lane], block_d[at] - ratio[lane]);
    }
  }
#pragma omp simd
  for (int64_t lane = 0; lane < kGroup; ++lane) sum[lane] /= sum_p[lane];
  std::copy(sum, sum + count, kl);
  for (int64_t lane = 0; stats != nullptr && lane < count; ++lane) {
    float* row = stats + kStats * lane;
    row[0] = max_p[lane], row[1] = sum_p[lane], row[2] = max_q[lane], row[3] = sum_q[lane], row[4] = sum[lane];
  }
}

// KL of rows [begin, begin + count), at most a chunk.
template <class T>
void forward_rows(const KlDivergenceArgs& a, int64_t begin, int64_t count, float* stats, float* kl) {
  const T* p = static_cast<const T*>(a.logits_p) + begin * a.stride_p;
  const T* q = static_cast<const T*>(a.logits_q) + begin * a.stride_q;
  if (stats != nullptr) stats += kStats * begin;
  if (a.classes <= kNarrow) {
    for (int64_t i = 0; i < count; i += kNarrowGroup)
      narrow_rows<kNarrowGroup>(p + i * a.stride_p, q + i * a.stride_q, a, std::min(kNarrowGroup, count - i),
                                stats == nullptr ? nullptr : stats + kStats * i, kl + i);
    return;
  }
  std::vector<float> scratch(static_cast<size_t>(3 * (a.classes + kLanes)));
  for (int64_t i = 0; i < count; ++i) {
    float row[kStats];
    kl[i] = row[4] = wide_row(p + i * a.stride_p, q + i * a.stride_q, a.classes, scratch.data(), row);
    if (stats != nullptr) std::copy(row, row + kStats, stats + kStats * i);
  }
}

template <class T>
void forward(const KlDivergenceArgs& a, Reduction reduction, float* loss, float* stats) {
  const int64_t bytes = 2 * a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  float* each = reduction == Reduction::none ? loss : nullptr;
  const double total = sum_over_rows(a.rows, bytes, each, [&](int64_t begin, int64_t count, float* values) {
    forward_rows<T>(a, begin, count, stats, values);
  });
  if (reduction != Reduction::none) *loss = reduce(total, reduction, a.rows);
}

// What the gradients of up to kLanes rows start from.
struct RowScalars {
  float max_p[kLanes], over_p[kLanes], max_q[kLanes], over_q[kLanes], ratio[kLanes], kl[kLanes], scale[kLanes];
};

void load_scalars(const float* stats, int64_t count, RowScalars& rows) {
  for (int64_t lane = 0; lane < count; ++lane, stats += kStats) {
    rows.max_p[lane] = stats[0];
    rows.over_p[lane] = 1.0f / stats[1];
    rows.max_q[lane] = stats[2];
    rows.over_q[lane] = 1.0f / stats[3];
    rows.ratio[lane] = log_ratio(stats[1], stats[3]);
    rows.kl[lane] = stats[4];
  }
}

// (grad_p, grad_q) of one class; what is not wanted is not computed.
template <bool kP, bool kQ>
inline void class_gradients(float z_p, float z_q, const RowScalars& rows, int64_t lane, float& grad_p, float& grad_q) {
  const float below_p = z_p - rows.max_p[lane], below_q = z_q - rows.max_q[lane];
  const float p = exp_nonpositive(below_p) * rows.over_p[lane];
  if (kP) {
    const float above = p * (((below_p - below_q) - rows.ratio[lane]) - rows.kl[lane]);
    const float none = 0.0f * rows.kl[lane];  // NaN where KL is not finite: such a row has no gradient
    grad_p = rows.scale[lane] * (p == 0.0f ? none : above);
  }
  if (kQ) grad_q = rows.scale[lane] * (exp_nonpositive(below_q) * rows.over_q[lane] - p);
}

template <bool kP, bool kQ, class T>
void wide_gradients(const T* p, const T* q, int64_t classes, const RowScalars& rows, int64_t lane, T* grad_p,
                    T* grad_q) {
#pragma omp simd
  for (int64_t j = 0; j < classes; ++j) {
    float class_p = 0.0f, class_q = 0.0f;
    class_gradients<kP, kQ>(to_float(p[j]), to_float(q[j]), rows, lane, class_p, class_q);
    if (kP) store(grad_p + j, class_p);
    if (kQ) store(grad_q + j, class_q);
  }
}

template <bool kP, bool kQ, class T>
void narrow_gradients(const T* p, const T* q, const KlDivergenceArgs& a, int64_t count, const RowScalars& rows,
                      T* grad_p, T* grad_q) {
  alignas(64) float block_p[kNarrow * kLanes], block_q[kNarrow * kLanes];
  load_transposed<kLanes>(p, a.stride_p, a.classes, count, block_p);
  load_transposed<kLanes>(q, a.stride_q, a.classes, count, block_q);
  for (int64_t j = 0; j < a.classes; ++j) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      float class_p = 0.0f, class_q = 0.0f;
      class_gradients<kP, kQ>(block_p[j * kLanes + lane], block_q[j * kLanes + lane], rows, lane, class_p, class_q);
      block_p[j * kLanes + lane] = class_p;
      block_q[j * kLanes + lane] = class_q;
    }
  }
  if (kP) store_transposed<kLanes>(block_p, a.classes, count, grad_p);
  if (kQ) store_transposed<kLanes>(block_q, a.classes, count, grad_q);
}

template <bool kP, bool kQ, class T>
void backward(const KlDivergenceArgs& a, Reduction reduction, const float* grad_loss, const float* stats, T* grad_p,
              T* grad_q) {
  const T* p = static_cast<const T*>(a.logits_p);
  const T* q = static_cast<const T*>(a.logits_q);
  const float shared = reduction == Reduction::mean ? grad_loss[0] / static_cast<float>(a.rows) : grad_loss[0];
  const int64_t bytes = a.rows * a.classes * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(grad_p, bytes);
  prefer_huge_pages(grad_q, bytes);
  parallel_chunks(row_chunks(a.rows), 3 * bytes, [&](int64_t chunk) {
    const int64_t end = std::min(a.rows, (chunk + 1) * kRowsPerChunk);
    for (int64_t i = chunk * kRowsPerChunk; i < end; i += kLanes) {
      const int64_t count = std::min(kLanes, end - i);
      RowScalars rows = {};
      load_scalars(stats + kStats * i, count, rows);
      for (int64_t lane = 0; lane < count; ++lane)
        rows.scale[lane] = reduction == Reduction::none ? grad_loss[i + lane] : shared;
      const T* rows_p = p + i * a.stride_p;
      const T* rows_q = q + i * a.stride_q;
      T* out_p = kP ? grad_p + i * a.classes : nullptr;
      T* out_q = kQ ? grad_q + i * a.classes : nullptr;
      if (a.classes <= kNarrow) {
        narrow_gradients<kP, kQ>(rows_p, rows_q, a, count, rows, out_p, out_q);
        continue;
      }
      for (int64_t lane = 0; lane < count; ++lane)
        wide_gradients<kP, kQ>(rows_p + lane * a.stride_p, rows_q + lane * a.stride_q, a.classes, rows, lane,
                               kP ? out_p + lane * a.classes : nullptr, kQ ? out_q + lane * a.classes : nullptr);
    }
  });
}

}  // namespace

void kl_divergence_fwd(const KlDivergenceArgs& args, Reduction reduction, float* loss, float* stats) {
  visit_dtype(args.dtype,
              [&](auto* element) { forward<std::remove_pointer_t<decltype(element)>>(args, reduction, loss, stats); });
}

void kl_divergence_bwd(const KlDivergenceArgs& args, Reduction reduction, const float* grad_loss, const float* stats,
                       void* grad_p, void* grad_q) {
  if (args.rows == 0) return;
  visit_dtype(args.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    T* out_p = static_cast<T*>(grad_p);
    T* out_q = static_cast<T*>(grad_q);
    if (out_p != nullptr && out_q != nullptr) backward<true, true>(args, reduction, grad_loss, stats, out_p, out_q);
    if (out_p != nullptr && out_q == nullptr) backward<true, false>(args, reduction, grad_loss, stats, out_p, out_q);
    if (out_p == nullptr && out_q != nullptr) backward<false, true>(args, reduction, grad_loss, stats, out_p, out_q);
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
