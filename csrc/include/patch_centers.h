// patch_centers: a pixel for every sample id, uniform over an image, from a counter-based generator.
#pragma once

#include <cstdint>

#include "isa.h"
#include "philox.h"

namespace bdfast {

struct PatchCentersArgs {
  const int64_t* ids;  // [N]
  int64_t count;
  int64_t height, width;  // below 2^31
  uint64_t key;
};

namespace BDFAST_ISA_NAMESPACE {

// Counter: (sample id, 0); the first word is for the row, the second for the column.
BDFAST_HOST_DEVICE void write_center(const PatchCentersArgs& a, int64_t i, int32_t* centers) {
  const PhiloxWords random = philox4x32(a.key, static_cast<uint64_t>(a.ids[i]), 0);
  centers[2 * i] = uniform_below(random.word[0], a.height);
  centers[2 * i + 1] = uniform_below(random.word[1], a.width);
}

}  // namespace BDFAST_ISA_NAMESPACE

BDFAST_DECLARE_CPU_KERNEL(void patch_centers(const PatchCentersArgs& args, int32_t* centers))

}  // namespace bdfast
