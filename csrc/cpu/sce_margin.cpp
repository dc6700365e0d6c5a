// sce_margin on the CPU.
//
// Computes   m_i = log sum_{j != y_i} exp(z_ij) - z_iy_i; +inf where a logit is not finite, -inf for a single class
// A chunk    owns 64 rows.
// Moves      reads N*C once (a row is read twice, the second time from L1), writes 4 bytes a row.
// Accumulates rows in float32, in vector lanes.
#include "sce_margin.h"

#include <atomic>
#include <type_traits>

#include "parallel.h"
#include "sce_row.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

// Whether all labels are classes; those of a chunk are looked at where its rows are read, by all threads.
template <class T>
bool margins(const LabelledRows& a, float* margin) {
  const T* logits = static_cast<const T*>(a.logits);
  std::atomic<bool> inside{true};
  parallel_chunks(row_chunks(a.rows), a.rows * a.classes * static_cast<int64_t>(sizeof(T)), [&](int64_t chunk) {
    const int64_t begin = chunk * kRowsPerChunk;
    const int64_t count = std::min(kRowsPerChunk, a.rows - begin);
    if (!labels_inside(a.target + begin, count, a.classes)) {
      inside.store(false, std::memory_order_relaxed);
      return;
    }
    SceRows rows;
    sce_rows<true>(logits + begin * a.row_stride, a.row_stride, a.classes, a.target + begin, count, rows);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) margin[begin + i] = sce_key(rows.max[i], rows.sum[i], rows.label[i]);
  });
  return inside.load();
}

}  // namespace

int64_t sce_margin(const LabelledRows& args, float* margin) {
  const bool inside = visit_dtype(
      args.dtype, [&](auto* element) { return margins<std::remove_pointer_t<decltype(element)>>(args, margin); });
  return inside ? -1 : first_label_outside(args.target, args.rows, args.classes);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
