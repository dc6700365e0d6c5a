// linear_sce_margin on the CPU: margins from tiles of logits that a matrix product left, a block of classes at a time.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bdfast {

// What is known of each row after some blocks of classes.
struct SceState {
  float* max;    // [N], over classes that are not the label; starts at 0
  float* sum;    // [N], of exp(z - max) over the same; starts at 0
  float* label;  // [N], z_y once its block has been seen
};

struct LogitsTile {
  const float* logits;  // [rows, classes], contiguous
  int64_t rows;
  int64_t classes;
  int64_t first_class;    // the class of column 0
  const int64_t* target;  // [rows]
};

// Joins a tile to the state of its rows.
BDFAST_DECLARE_CPU_KERNEL(void linear_sce_margin_update(const LogitsTile& tile, const SceState& state))

// Writes `margin` [N] from the state of all blocks.
BDFAST_DECLARE_CPU_KERNEL(void linear_sce_margin_finish(const SceState& state, int64_t rows, float* margin))

}  // namespace bdfast
