// scale_to_ball_ on the GPU: one launch, a block an image, which is read again from L1 or L2 to be scaled.
#include <algorithm>
#include <cstdint>

#include "cuda_api.h"
#include "cuda_launch.h"
#include "cuda_reduce.cuh"
#include "cuda_vector.cuh"
#include "scale_to_ball.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr const char* kOp = "scale_to_ball_";
constexpr int kThreads = 512;

// Computes d * min(1, radius / ||d||).
// A block owns every gridDim-th image.
// Reads d, and where its norm is too large reads it again and writes it.
// Accumulates in float64: by thread, by warp, by block.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) scale_to_ball_kernel(const __grid_constant__ ScaleToBallArgs a) {
  const int64_t vectors = a.numel / kVector;
  for (int64_t image = blockIdx.x; image < a.images; image += gridDim.x) {
    T* values = static_cast<T*>(a.perturbation) + image * a.numel;
    double terms[1] = {0.0};
    for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
      const auto loaded = load_values<T, kVector>(values + i * kVector);
#pragma unroll
      for (int v = 0; v < kVector; ++v) terms[0] += norm_term(to_float(loaded.value[v]), a.one_norm);
    }
    block_sum<kThreads>(terms);
    const double scale = ball_scale(a, image, terms[0]);
    if (scale == 1.0) continue;  // the same in all threads
    for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
      auto loaded = load_values<T, kVector>(values + i * kVector);
#pragma unroll
      for (int v = 0; v < kVector; ++v) store(&loaded.value[v], scaled(to_float(loaded.value[v]), scale));
      store_values(values + i * kVector, loaded);
    }
  }
}

template <class T>
void launch(const ScaleToBallArgs& a, cudaStream_t queue) {
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(a.perturbation) % 16 == 0 && a.numel % kVector == 0;
  auto* const kernel = aligned ? scale_to_ball_kernel<T, kVector> : scale_to_ball_kernel<T, 1>;
  const int blocks = static_cast<int>(std::min<int64_t>(1 << 30, a.images));
  BDFAST_LAUNCH(kernel, blocks, kThreads, queue, a);
  check_cuda(cudaGetLastError(), kOp, "scale_to_ball_kernel");
}

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

void scale_to_ball_cuda(const ScaleToBallArgs& args, void* stream) {
  if (args.images * args.numel == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::float16:
      return launch<Float16>(args, queue);
    case DType::bfloat16:
      return launch<BFloat16>(args, queue);
    default:
      return launch<float>(args, queue);
  }
}

}  // namespace bdfast
