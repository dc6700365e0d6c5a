// kl_divergence on the CPU.
//
// Computes   KL_i = sum_j p (d - 1) + q, d = log p - log q: terms >= 0 of which the small ones come from a series
//            dq_ij = grad_i (q - p), dp_ij = grad_i p (d - KL_i)
// A chunk    owns 64 rows, and reduces them by halves; chunks are summed in order.
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
constexpr int64_t kNarrowGroup = kPack == 1 ? 32 : 64;

// p (d - 1) + q = p (d + exp(-d) - 1) >= 0, up to a factor that p and q share. For |d| < 1/2, where that cancels, by the
// polynomial of degree 7 in d whose largest relative error there is the least, 2.4e-8. Where p = 0 it is q, whatever d:
// infinite or NaN, d becomes the lowest number, which the maximum below keeps apart from p * NaN.
inline Pack kl_term(Pack p, Pack q, Pack d) {
  const Pack finite = max(Pack(-3.402823466e+38f), d);
  const Pack square = d * d;
  Pack series = d * -1.98756289e-4f + 1.39819970e-3f;
  series = series * d - 8.33345217e-3f;
  series = series * d + 4.16657960e-2f;
  series = series * d - 1.66666655e-1f;
  series = series * d + 0.5f;
  const Pack factor = where_less(square, 0.25f, square * series, finite);
  return p * factor + where_less(square, 0.25f, 0.0f, q - p);
}

// exp(z - maximum) of kWidth classes of both rows and the differences of z - maximum, added to sums in lanes of their own.
template <int64_t kWidth, class T>
inline void add_classes(const T* p, const T* q, float max_p, float max_q, float* terms_p, float* terms_q, float* below,
                        Pack* sum_p, Pack* sum_q) {
  BDFAST_PACKS
  for (int64_t k = 0; k < kWidth / kPack; ++k) {
    const int64_t j = k * kPack;
    const Pack below_p = load_pack(p + j) - max_p, below_q = load_pack(q + j) - max_q;
    const Pack term_p = exp_nonpositive(below_p), term_q = exp_nonpositive(below_q);
    store_pack(terms_p + j, term_p);
    store_pack(terms_q + j, term_q);
    store_pack(below + j, below_p - below_q);
    sum_p[k] += term_p;
    sum_q[k] += term_q;
  }
}

// KL of a row, and its (maximum, sum)s; `scratch` has room for 3 times the classes, rounded up to whole vectors. The rows
// after it are fetched meanwhile.
template <class T>
float wide_row(const T* p, const T* q, const KlDivergenceArgs& a, float* scratch, float* stats) {
  const int64_t classes = a.classes;
  const int64_t padded = (classes + kLanes - 1) / kLanes * kLanes, whole = classes / kWide * kWide;
  float *terms_p = scratch, *terms_q = scratch + padded, *below = scratch + 2 * padded;
  const float max_p = wide_row_max<false>(p, classes).max, max_q = wide_row_max<false>(q, classes).max;
  alignas(64) Pack sums_p[kWide / kPack] = {}, sums_q[kWide / kPack] = {}, sums[kWide / kPack] = {};
  for (int64_t j = 0; j < whole; j += kWide) {
    prefetch<kWide>(p + a.stride_p + j);
    prefetch<kWide>(q + a.stride_q + j);
    add_classes<kWide>(p + j, q + j, max_p, max_q, terms_p + j, terms_q + j, below + j, sums_p, sums_q);
  }
  // The classes that are left, and -inf up to a whole vector, which adds nothing to any sum.
  alignas(64) float tail_p[kWide], tail_q[kWide];
  for (int64_t j = whole; j < classes; ++j) tail_p[j - whole] = to_float(p[j]), tail_q[j - whole] = to_float(q[j]);
  for (int64_t j = classes; j < padded; ++j) tail_p[j - whole] = tail_q[j - whole] = -INFINITY;
  for (int64_t j = whole; j < padded; j += kLanes)
    add_classes<kLanes>(tail_p + (j - whole), tail_q + (j - whole), max_p, max_q, terms_p + j, terms_q + j, below + j,
                        sums_p, sums_q);
  const float sum_p = sum_packs<kWide>(sums_p), sum_q = sum_packs<kWide>(sums_q);
  const float share = sum_p / sum_q, ratio = log_positive(share);
  for (int64_t j = 0; j < whole; j += kWide) {
    BDFAST_PACKS
    for (int64_t k = 0; k < kWide / kPack; ++k)
      sums[k] += kl_term(load_pack(terms_p + j + k * kPack), load_pack(terms_q + j + k * kPack) * share,
                         load_pack(below + j + k * kPack) - ratio);
  }
  for (int64_t j = whole; j < padded; j += kLanes) {
    BDFAST_PACKS
    for (int64_t k = 0; k < kLanes / kPack; ++k)
      sums[k] += kl_term(load_pack(terms_p + j + k * kPack), load_pack(terms_q + j + k * kPack) * share,
                         load_pack(below + j + k * kPack) - ratio);
  }
  stats[0] = max_p, stats[1] = sum_p, stats[2] = max_q, stats[3] = sum_q;
  return sum_packs<kWide>(sums) / sum_p;
}

// The same of `count` <= kGroup rows, one a vector lane.
template <int64_t kGroup, class T>
void narrow_rows(const T* p, const T* q, const KlDivergenceArgs& a, int64_t count, float* stats, float* kl) {
  constexpr int64_t packs = kGroup / kPack;
  // Of each class: z of p, then d; z of q, then exp(z - maximum) of q; exp(z - maximum) of p.
  alignas(64) float block_d[kNarrow * kGroup], block_q[kNarrow * kGroup], block_p[kNarrow * kGroup];
  load_transposed<kGroup>(p, a.stride_p, a.classes, count, block_d);
  load_transposed<kGroup>(q, a.stride_q, a.classes, count, block_q);
  alignas(64) Pack max_p[packs], max_q[packs], sum_p[packs] = {}, sum_q[packs] = {}, sum[packs] = {}, ratio[packs],
                                               share[packs];
  std::fill(max_p, max_p + packs, Pack(-INFINITY));
  std::fill(max_q, max_q + packs, Pack(-INFINITY));
  for (int64_t at = 0; at < a.classes * kGroup; at += kGroup) {
    BDFAST_PACKS
    for (int64_t k = 0; k < packs; ++k) {
      max_p[k] = max(max_p[k], load_pack(block_d + at + k * kPack));
      max_q[k] = max(max_q[k], load_pack(block_q + at + k * kPack));
    }
  }
  for (int64_t at = 0; at < a.classes * kGroup; at += kGroup) {
    BDFAST_PACKS
    for (int64_t k = 0; k < packs; ++k) {
      const Pack below_p = load_pack(block_d + at + k * kPack) - max_p[k];
      const Pack below_q = load_pack(block_q + at + k * kPack) - max_q[k];
      const Pack term_p = exp_nonpositive(below_p), term_q = exp_nonpositive(below_q);
      sum_p[k] += term_p;
      sum_q[k] += term_q;
      store_pack(block_p + at + k * kPack, term_p);
      store_pack(block_q + at + k * kPack, term_q);
      store_pack(block_d + at + k * kPack, below_p - below_q);
    }
  }
  BDFAST_PACKS
  for (int64_t k = 0; k < packs; ++k) {
    share[k] = sum_p[k] / sum_q[k];
    ratio[k] = log_positive(share[k]);
  }
  for (int64_t at = 0; at < a.classes * kGroup; at += kGroup) {
    BDFAST_PACKS
    for (int64_t k = 0; k < packs; ++k) {
      const int64_t first = at + k * kPack;
      sum[k] += kl_term(load_pack(block_p + first), load_pack(block_q + first) * share[k],
                        load_pack(block_d + first) - ratio[k]);
    }
  }
  BDFAST_PACKS
  for (int64_t k = 0; k < packs; ++k) sum[k] = sum[k] / sum_p[k];
  alignas(64) float columns[kStats][kGroup];
  store_packs<kGroup>(sum, columns[4]);
  std::copy(columns[4], columns[4] + count, kl);
  if (stats == nullptr) return;
  store_packs<kGroup>(max_p, columns[0]);
  store_packs<kGroup>(sum_p, columns[1]);
  store_packs<kGroup>(max_q, columns[2]);
  store_packs<kGroup>(sum_q, columns[3]);
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t k = 0; k < kStats; ++k) stats[kStats * lane + k] = columns[k][lane];
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
  std::vector<float> scratch(static_cast<size_t>(3 * (a.classes + kLanes) + kLanes));
  const uintptr_t line = kLanes * sizeof(float);  // what a vector that is not aligned to it would straddle
  float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + line - 1) / line * line);
  for (int64_t i = 0; i < count; ++i) {
    float row[kStats];
    kl[i] = row[4] = wide_row(p + i * a.stride_p, q + i * a.stride_q, a, aligned, row);
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
  alignas(64) float max_p[kLanes], over_p[kLanes], max_q[kLanes], over_q[kLanes], ratio[kLanes], kl[kLanes],
      scale[kLanes];
};

void load_scalars(const float* stats, int64_t count, RowScalars& rows) {
  for (int64_t lane = 0; lane < count; ++lane, stats += kStats) {
    rows.max_p[lane] = stats[0];
    rows.over_p[lane] = 1.0f / stats[1];
    rows.max_q[lane] = stats[2];
    rows.over_q[lane] = 1.0f / stats[3];
    rows.ratio[lane] = log_positive(stats[1] / stats[3]);
    rows.kl[lane] = stats[4];
  }
}

// The same of a pack of rows, or of one row in every lane.
struct PackScalars {
  Pack max_p, over_p, max_q, over_q, ratio, kl, scale;
};

PackScalars scalars_of_rows(const RowScalars& rows, int64_t lane) {
  return {load_pack(rows.max_p + lane),  load_pack(rows.over_p + lane), load_pack(rows.max_q + lane),
          load_pack(rows.over_q + lane), load_pack(rows.ratio + lane),  load_pack(rows.kl + lane),
          load_pack(rows.scale + lane)};
}

PackScalars scalars_of_row(const RowScalars& rows, int64_t lane) {
  return {rows.max_p[lane], rows.over_p[lane], rows.max_q[lane], rows.over_q[lane],
          rows.ratio[lane], rows.kl[lane],     rows.scale[lane]};
}

// (grad_p, grad_q) of a pack; what is not wanted is not computed.
template <bool kP, bool kQ>
inline void pack_gradients(Pack z_p, Pack z_q, const PackScalars& rows, Pack& grad_p, Pack& grad_q) {
  const Pack below_p = z_p - rows.max_p, below_q = z_q - rows.max_q;
  const Pack p = exp_nonpositive(below_p) * rows.over_p;
  if (kP) {
    const Pack above = p * (((below_p - below_q) - rows.ratio) - rows.kl);
    const Pack none = rows.kl * 0.0f;  // where p = 0: NaN if KL is not finite, since such a row has no gradient
    grad_p = rows.scale * where_less(0.0f, p, above, none);
  }
  if (kQ) grad_q = rows.scale * (exp_nonpositive(below_q) * rows.over_q - p);
}

template <bool kP, bool kQ, class T>
void wide_gradients(const T* p, const T* q, int64_t classes, const RowScalars& rows, int64_t lane, T* grad_p,
                    T* grad_q) {
  const PackScalars row = scalars_of_row(rows, lane);
  for_packs(classes, [&](int64_t j, int64_t n) {
    Pack pack_p = 0.0f, pack_q = 0.0f;
    pack_gradients<kP, kQ>(load_first(p + j, n), load_first(q + j, n), row, pack_p, pack_q);
    if (kP) store_first(grad_p + j, n, pack_p);
    if (kQ) store_first(grad_q + j, n, pack_q);
  });
}

template <bool kP, bool kQ, class T>
void narrow_gradients(const T* p, const T* q, const KlDivergenceArgs& a, int64_t count, const RowScalars& rows,
                      T* grad_p, T* grad_q) {
  alignas(64) float block_p[kNarrow * kLanes], block_q[kNarrow * kLanes];
  load_transposed<kLanes>(p, a.stride_p, a.classes, count, block_p);
  load_transposed<kLanes>(q, a.stride_q, a.classes, count, block_q);
  for (int64_t j = 0; j < a.classes; ++j) {
    BDFAST_PACKS
    for (int64_t lane = 0; lane < kLanes; lane += kPack) {
      float *at_p = block_p + j * kLanes + lane, *at_q = block_q + j * kLanes + lane;
      Pack pack_p = 0.0f, pack_q = 0.0f;
      pack_gradients<kP, kQ>(load_pack(at_p), load_pack(at_q), scalars_of_rows(rows, lane), pack_p, pack_q);
      store_pack(at_p, pack_p);
      store_pack(at_q, pack_q);
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
