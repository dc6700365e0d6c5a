// linear_sce_margin on the CPU: what is left to do once BLAS has computed a tile of logits.
//
// Computes   an online logsumexp over blocks of classes, without the label; the margin is stated in sce_row.h
// A chunk    owns 64 rows of the tile.
// Moves      reads the tile, which is still in the cache, and 12 bytes a row.
// Accumulates rows in float32, in vector lanes, blocks of classes in order.
#include "linear_sce_margin.h"

#include "parallel.h"
#include "sce_row.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

void linear_sce_margin_update(const LogitsTile& tile, const SceState& state) {
  const int64_t bytes = tile.rows * tile.classes * static_cast<int64_t>(sizeof(float));
  parallel_chunks(row_chunks(tile.rows), bytes, [&](int64_t chunk) {
    const int64_t end = std::min(tile.rows, (chunk + 1) * kRowsPerChunk);
    for (int64_t i = chunk * kRowsPerChunk; i < end; ++i) {
      const float* row = tile.logits + i * tile.classes;
      float max, sum;
      wide_sce_row<true>(row, row + tile.classes, tile.classes, tile.target[i] - tile.first_class, max, sum,
                         state.label[i]);
      merge(state.max[i], state.sum[i], max, sum);
    }
  });
}

void linear_sce_margin_finish(const SceState& state, int64_t rows, float* margin) {
#pragma omp simd
  for (int64_t i = 0; i < rows; ++i) margin[i] = sce_key(state.max[i], state.sum[i], state.label[i]);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
