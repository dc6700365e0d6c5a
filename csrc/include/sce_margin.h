// sce_margin on the CPU: logsumexp(z_j, j != y) - z_y of each row, +inf for rows that are not finite.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace bdfast {

// Writes `margin` [N]. Returns the index of the first row whose target lies outside [0, C), or -1; nothing of use is
// written in that case.
BDFAST_DECLARE_CPU_KERNEL(int64_t sce_margin(const LabelledRows& args, float* margin))

}  // namespace bdfast
