// sce_margin on the CPU.
//
// Computes   m_i = log sum_{j != y_i} exp(z_ij) - z_iy_i; +inf where a logit is not finite, -inf for a single class
// A chunk    owns 64 rows.
// Moves      reads N*C once (a row is read twice, the second time from L1), writes 4 bytes a row.
// Accumulates rows in float32, in vector lanes.
#include "sce_margin.h"

#include <type_traits>

#include "parallel.h"
#include "sce_row.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

template <class T>
void margins(const LabelledRows& a, float* margin) {
  const T* logits = static_cast<const T*>(a.logits);
  parallel_chunks(row_chunks(a.rows), a.rows * a.classes * static_cast<int64_t>(sizeof(T)), [&](int64_t chunk) {
    const int64_t begin = chunk * kRowsPerChunk;
    const int64_t count = std::min(kRowsPerChunk, a.rows - begin);
    SceRows rows;
    sce_rows<true>(logits + begin * a.row_stride, a.row_stride, a.classes, a.target + begin, count, rows);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) margin[begin + i] = sce_key(rows.max[i], rows.sum[i], rows.label[i]);
  });
}

}  // namespace

int64_t sce_margin(const LabelledRows& args, float* margin) {
  const int64_t outside = first_label_outside(args.target, args.rows, args.classes);
  if (outside >= 0) return outside;
  visit_dtype(args.dtype, [&](auto* element) { margins<std::remove_pointer_t<decltype(element)>>(args, margin); });
  return -1;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
