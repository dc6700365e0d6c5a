// Kernel launches, checked. The only place that knows which compiler reads a .cu file: nvcc, or a plain C++ compiler
// with the header of tests/cuda_on_cpu on its path, which runs the threads of a block in turn on the CPU.
#pragma once

#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define BDFAST_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#else
#include "cuda_on_cpu.h"
#define BDFAST_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), ::cuda_on_cpu::launch(blocks, threads, [&] { kernel(__VA_ARGS__); }))
#endif

namespace bdfast {

inline void check_cuda(cudaError_t error, const char* op, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + call + " expected success, got \"" + cudaGetErrorString(error) +
                           "\"; run with CUDA_LAUNCH_BLOCKING=1 to find the first failure, and see `bdfast doctor` for "
                           "the GPU architectures that this build holds");
}

}  // namespace bdfast
