// patch_centers on the CPU.
//
// Computes   a uniform pixel for every sample id.
// A chunk    owns 4,096 ids.
// Moves      reads 8 bytes and writes 8 bytes a sample.
// Accumulates nothing.
#include "patch_centers.h"

#include <algorithm>

#include "parallel.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

void patch_centers(const PatchCentersArgs& args, int32_t* centers) {
  constexpr int64_t kChunk = 4096;
  const int64_t work = 16 * 16 * args.count;  // an id costs what moving sixteen times its bytes does
  parallel_chunks((args.count + kChunk - 1) / kChunk, work, [&](int64_t chunk) {
    const int64_t end = std::min(args.count, (chunk + 1) * kChunk);
#pragma omp simd
    for (int64_t i = chunk * kChunk; i < end; ++i) write_center(args, i, centers);
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
