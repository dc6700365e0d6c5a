// Sums over the threads of a block, in an order that never changes.
#pragma once

#include "cuda_launch.h"
#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

template <int kCount>
__device__ __forceinline__ void warp_sum(double (&sums)[kCount]) {  // the result is in lane 0
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[k] += __shfl_down_sync(0xffffffffu, sums[k], offset);
  }
}

// Replaces each thread's `sums` by their sums over the block of kThreads; called by all of its threads.
template <int kThreads, int kCount>
__device__ __forceinline__ void block_sum(double (&sums)[kCount]) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0 && kWarps <= 32, "one warp adds the sums of all warps");
  __shared__ double of_warp[kCount][kWarps];
  __shared__ double of_block[kCount];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  warp_sum(sums);
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) of_warp[k][warp] = sums[k];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[k] = lane < kWarps ? of_warp[k][lane] : 0.0;
    warp_sum(sums);
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) of_block[k] = sums[k];
    }
  }
  __syncthreads();
  // A next call writes `of_block` only after its first barrier, which nobody passes before having read this.
#pragma unroll
  for (int k = 0; k < kCount; ++k) sums[k] = of_block[k];
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
