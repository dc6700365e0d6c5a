// scale_to_ball_ on the GPU: one launch, a block an image, which is read again from L1 or L2 to be scaled. Images that are
// few and large are cut into parts, a block each: one launch sums the terms of every part, the next adds up those of an
// image, each of its blocks in the same order, and scales.
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

// Sum over the threads of the block of the terms of vectors begin ... end - 1.
template <class T, int kVector>
__device__ __forceinline__ double sum_of_terms(const T* values, int64_t begin, int64_t end, bool one_norm) {
  double terms[1] = {0.0};
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const auto loaded = load_values<T, kVector>(values + i * kVector);
#pragma unroll
    for (int v = 0; v < kVector; ++v) terms[0] += norm_term(to_float(loaded.value[v]), one_norm);
  }
  block_sum<kThreads>(terms);
  return terms[0];
}

template <class T, int kVector>
__device__ __forceinline__ void scale_vectors(T* values, int64_t begin, int64_t end, double scale) {
  if (scale == 1.0) return;  // the same in all threads
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    auto loaded = load_values<T, kVector>(values + i * kVector);
#pragma unroll
    for (int v = 0; v < kVector; ++v) store(&loaded.value[v], scaled(to_float(loaded.value[v]), scale));
    store_values(values + i * kVector, loaded);
  }
}

// Computes d * min(1, radius / ||d||).
// A block owns every gridDim-th image.
// Reads d, and where its norm is too large reads it again and writes it.
// Accumulates in float64: by thread, by warp, by block.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) scale_to_ball_kernel(const __grid_constant__ ScaleToBallArgs a) {
  const int64_t vectors = a.numel / kVector;
  for (int64_t image = blockIdx.x; image < a.images; image += gridDim.x) {
    T* values = static_cast<T*>(a.perturbation) + image * a.numel;
    const double terms = sum_of_terms<T, kVector>(values, 0, vectors, a.one_norm);
    scale_vectors<T, kVector>(values, 0, vectors, ball_scale(a, image, terms));
  }
}

// Computes the terms of every part, or with kScale what scale_to_ball_kernel does, from those.
// A block owns a part of an image: part after part, image after image.
// Reads d; with kScale reads the parts of its image, and where the norm is too large d, and writes it.
// Accumulates in float64: by thread, by warp, by block, and over parts likewise.
template <class T, int kVector, bool kScale>
__global__ void __launch_bounds__(kThreads)
    scale_parts_kernel(const __grid_constant__ ScaleToBallArgs a, int64_t parts, double* partials) {
  const int64_t image = blockIdx.x / parts, part = blockIdx.x % parts;
  const int64_t vectors = a.numel / kVector, length = (vectors + parts - 1) / parts;
  const int64_t begin = part * length < vectors ? part * length : vectors;
  const int64_t end = begin + length < vectors ? begin + length : vectors;
  T* values = static_cast<T*>(a.perturbation) + image * a.numel;
  if constexpr (kScale) {
    double terms[1] = {threadIdx.x < parts ? partials[image * parts + threadIdx.x] : 0.0};
    block_sum<kThreads>(terms);
    scale_vectors<T, kVector>(values, begin, end, ball_scale(a, image, terms[0]));
  } else {
    const double terms = sum_of_terms<T, kVector>(values, begin, end, a.one_norm);
    if (threadIdx.x == 0) partials[blockIdx.x] = terms;
  }
}

template <class T, int kVector>
void launch(const ScaleToBallArgs& a, int64_t parts, double* partials, cudaStream_t queue) {
  if (parts <= 1) {
    auto* const kernel = scale_to_ball_kernel<T, kVector>;
    BDFAST_LAUNCH(kernel, static_cast<int>(std::min<int64_t>(1 << 30, a.images)), kThreads, queue, a);
    return check_cuda(cudaGetLastError(), kOp, "scale_to_ball_kernel");
  }
  auto* const add = scale_parts_kernel<T, kVector, false>;
  auto* const scale = scale_parts_kernel<T, kVector, true>;
  const int blocks = static_cast<int>(a.images * parts);
  BDFAST_LAUNCH(add, blocks, kThreads, queue, a, parts, partials);
  BDFAST_LAUNCH(scale, blocks, kThreads, queue, a, parts, partials);
  check_cuda(cudaGetLastError(), kOp, "scale_parts_kernel");
}

template <class T>
void choose(const ScaleToBallArgs& a, int64_t parts, double* partials, cudaStream_t queue) {
  constexpr int kVector = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(a.perturbation) % 16 == 0 && a.numel % kVector == 0;
  if (aligned) return launch<T, kVector>(a, parts, partials, queue);
  launch<T, 1>(a, parts, partials, queue);
}

static_assert(kThreads >= kScaleToBallParts, "a thread takes a part");

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

void scale_to_ball_cuda(const ScaleToBallArgs& args, int64_t parts, double* partials, void* stream) {
  if (args.images * args.numel == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::float16:
      return choose<Float16>(args, parts, partials, queue);
    case DType::bfloat16:
      return choose<BFloat16>(args, parts, partials, queue);
    default:
      return choose<float>(args, parts, partials, queue);
  }
}

}  // namespace bdfast
