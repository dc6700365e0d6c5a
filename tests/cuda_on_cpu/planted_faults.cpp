// Kernels with faults that the runner has to report, and one without.
#include "cuda_launch.h"

namespace {

__global__ void barrier_for_some(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void shuffle_for_some(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 1);
}

__global__ void two_barriers(int* out) {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void reverse(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

}  // namespace

extern "C" const char* run(int which, int* out) {
  return cuda_on_cpu::message_of([&] {
    if (which == 0) BDFAST_LAUNCH(barrier_for_some, 1, 64, nullptr, out);
    if (which == 1) BDFAST_LAUNCH(shuffle_for_some, 1, 64, nullptr, out);
    if (which == 2) BDFAST_LAUNCH(two_barriers, 1, 64, nullptr, out);
    if (which == 3) BDFAST_LAUNCH(reverse, 1, 64, nullptr, out);
    bdfast::check_cuda(cudaGetLastError(), "planted_faults", "launch");
  });
}
