// patch_centers on the GPU: one launch.
#include <algorithm>
#include <cstdint>

#include "cuda_api.h"
#include "cuda_launch.h"
#include "patch_centers.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr const char* kOp = "patch_centers";
constexpr int kThreads = 256;

// Computes a uniform pixel for every sample id.
// A thread owns an id.
// Reads 8 bytes and writes 8 bytes a sample.
// Accumulates nothing.
__global__ void __launch_bounds__(kThreads)
    patch_centers_kernel(const __grid_constant__ PatchCentersArgs a, int32_t* centers) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.count; i += stride)
    write_center(a, i, centers);
}

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

void patch_centers_cuda(const PatchCentersArgs& args, int32_t* centers, void* stream) {
  if (args.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  const int blocks = static_cast<int>(std::min<int64_t>(1 << 20, (args.count + kThreads - 1) / kThreads));
  BDFAST_LAUNCH(patch_centers_kernel, blocks, kThreads, queue, args, centers);
  check_cuda(cudaGetLastError(), kOp, "patch_centers_kernel");
}

}  // namespace bdfast
