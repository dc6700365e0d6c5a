// Runs CUDA kernels on the CPU, for tests of their logic: g++ compiles the very .cu file with this header on its path.
//
// Blocks run one after another; a block's threads are fibers that run in turn until each waits at a barrier or a shuffle.
// A barrier opens when all threads of the block stand at it, a shuffle when all lanes of the warp do; when nobody can go
// on, the launch fails and says who waits where. Not covered: races, memory ordering, anything about speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct alignas(16) float4 {
  float x, y, z, w;
};
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;

namespace cuda_on_cpu {

enum class State { ready, at_shuffle, at_barrier, finished };

struct Fiber {
  ucontext_t start;  // how it begins; later switches are jumps, which make no system call
  jmp_buf resume;
  bool started;
  State state;
  int line;          // where it waits
  unsigned shuffle;  // how many it has passed: two slots take turns, so that a value is read before it is overwritten
  uint64_t slot[2];
};

inline int multiprocessors = 2;
inline bool reverse_blocks = false;
inline std::string error;
inline std::vector<Fiber> fibers;
inline unsigned current;
inline jmp_buf scheduler;
inline std::function<void()> kernel_call;

inline void wait(State state, int line) {
  fibers[current].state = state;
  fibers[current].line = line;
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

inline void run_until_wait(unsigned t) {
  current = t;
  threadIdx.x = t;
  if (_setjmp(scheduler) != 0) return;
  if (fibers[current].started) _longjmp(fibers[current].resume, 1);
  fibers[current].started = true;
  setcontext(&fibers[current].start);
}

inline void run_thread() {
  kernel_call();
  wait(State::finished, 0);
}

// Lets the threads [begin, end) go on if all of them wait in `state` at one line.
inline bool release(unsigned begin, unsigned end, State state) {
  for (unsigned t = begin; t < end; ++t) {
    if (fibers[t].state != state || fibers[t].line != fibers[begin].line) return false;
  }
  for (unsigned t = begin; t < end; ++t) fibers[t].state = State::ready;
  return true;
}

inline std::string describe(unsigned t) {
  const char* where[] = {"is ready", "waits at a shuffle", "waits at a barrier", "has left the kernel"};
  return "thread " + std::to_string(t) + " " + where[static_cast<int>(fibers[t].state)] +
         (fibers[t].line ? " in line " + std::to_string(fibers[t].line) : "");
}

inline bool run_block(unsigned threads) {
  constexpr size_t kStack = 64 * 1024;
  static std::vector<char> stacks;
  stacks.resize(std::max<size_t>(stacks.size(), threads * kStack));
  fibers.assign(threads, Fiber{});
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&fibers[t].start);
    fibers[t].start.uc_stack.ss_sp = stacks.data() + t * kStack;
    fibers[t].start.uc_stack.ss_size = kStack;
    makecontext(&fibers[t].start, run_thread, 0);
  }
  for (;;) {
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].state == State::ready) run_until_wait(t);
    }
    bool released = false;
    for (unsigned w = 0; w < threads; w += 32) released |= release(w, std::min(w + 32, threads), State::at_shuffle);
    if (released || release(0, threads, State::at_barrier)) continue;
    unsigned other = 0;
    while (other < threads && fibers[other].state == fibers[0].state && fibers[other].line == fibers[0].line) ++other;
    if (other == threads && fibers[0].state == State::finished) return true;
    error = "divergence: " + describe(0) + (other < threads ? ", " + describe(other) : "");
    return false;
  }
}

inline void launch(int blocks, int threads, std::function<void()> call) {
  kernel_call = std::move(call);
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  for (int b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(reverse_blocks ? blocks - 1 - b : b);
    if (!run_block(blockDim.x)) return;
  }
}

// What `call` threw, or "": for libraries that are driven through C.
template <class Call>
const char* message_of(const Call& call) {
  static std::string message;
  message.clear();
  try {
    call();
  } catch (const std::exception& thrown) {
    message = thrown.what();
  }
  return message.c_str();
}

}  // namespace cuda_on_cpu

#define __syncthreads() ::cuda_on_cpu::wait(::cuda_on_cpu::State::at_barrier, __LINE__)
#define __shfl_down_sync(mask, value, delta) ::cuda_on_cpu_shuffle(mask, value, delta, __LINE__)

template <class T>
T cuda_on_cpu_shuffle(unsigned, T value, unsigned delta, int line) {
  using namespace cuda_on_cpu;
  static_assert(sizeof(T) <= sizeof(uint64_t), "one slot a lane");
  const unsigned parity = fibers[current].shuffle++ % 2;
  std::memcpy(&fibers[current].slot[parity], &value, sizeof value);
  wait(State::at_shuffle, line);
  if (current % 32 + delta < 32) std::memcpy(&value, &fibers[current + delta].slot[parity], sizeof value);
  return value;
}

inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stwb(T* p, T value) {
  *p = value;
}

template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = cuda_on_cpu::multiprocessors, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cuda_on_cpu::error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
inline const char* cudaGetErrorString(cudaError_t) {
  static std::string reported;
  reported = std::exchange(cuda_on_cpu::error, "");
  return reported.c_str();
}
