// smallest_per_class: the indices of the k smallest scores of each class, by (score, index).
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace bdfast {

struct SmallestPerClassArgs {
  const float* scores;    // [N]; NaN and +inf are never selected
  const int64_t* labels;  // [N]
  int64_t count;          // N < 2^32
  int64_t k;
  int64_t classes;  // C
};

namespace BDFAST_ISA_NAMESPACE {

BDFAST_HOST_DEVICE bool is_selectable(float score) { return score <= 3.402823466e+38f; }  // NaN is not

// Orders as (score, index) does, and no two samples share one: any selection by it is deterministic, in whatever order
// threads get there. -0.0 equals 0.0.
BDFAST_HOST_DEVICE uint64_t selection_key(float score, int64_t index) {
  const float unsigned_zero = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &unsigned_zero, sizeof bits);
  const uint32_t ordered = (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(ordered) << 32) | static_cast<uint64_t>(index);
}

BDFAST_HOST_DEVICE int64_t selected_index(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

}  // namespace BDFAST_ISA_NAMESPACE

// Writes `indices` [C, k], -1 where a class has fewer, and `counts` [C]. Returns the index of the first label outside
// [0, C), or -1; nothing of use is written in that case.
BDFAST_DECLARE_CPU_KERNEL(int64_t smallest_per_class(const SmallestPerClassArgs& args, int64_t* indices,
                                                     int64_t* counts))

}  // namespace bdfast
