// smallest_per_class on the GPU: keys are dealt out to their classes, then a block selects within each class.
//
//   count     how many selectable samples each class has                                          12 bytes a sample
//             its last block: where each class begins; how many of it will be selected
//   deal      the key of each sample to its class, in any order                                   20 bytes a sample
//   select    the k-th smallest key of a class by radix select, 8 bits a pass; the keys up to it, sorted
//
// The order in which atomics hand out places differs from run to run, and cannot be seen: keys are unique, a selection is
// a set, and it is sorted at the end. Nothing is sorted that is not selected.
#include <cstdint>

#include "cuda_api.h"
#include "cuda_launch.h"
#include "smallest_per_class.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr const char* kOp = "smallest_per_class";
constexpr int kThreads = 256;
constexpr int64_t kTile = 4096;           // samples of a block while counting and dealing
constexpr int64_t kSharedClasses = 1024;  // up to here a block counts in shared memory, and few classes do not collide

struct Work {
  SmallestPerClassArgs args;
  SmallestPerClassScratch scratch;
  int64_t* indices;  // [C, k]
  int64_t* counts;   // [C]
};

// -1 for samples that are never selected; a label out of range is no address.
__device__ __forceinline__ int64_t class_of(const SmallestPerClassArgs& a, int64_t i) {
  if (!is_selectable(a.scores[i])) return -1;
  const int64_t label = a.labels[i];
  return label >= 0 && label < a.classes ? label : -1;
}

// A thread's samples of this block's tile.
template <class Body>
__device__ __forceinline__ void for_each_sample(const SmallestPerClassArgs& a, const Body& body) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t end = begin + kTile < a.count ? begin + kTile : a.count;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t label = class_of(a, i);
    if (label >= 0) body(i, label);
  }
}

__device__ __forceinline__ void clear(unsigned* counters, int64_t size) {
  for (int64_t c = threadIdx.x; c < size; c += kThreads) counters[c] = 0;
  __syncthreads();
}

// The exclusive sums of `sizes`: where the keys of a class start, and where its next one goes. A thread owns a run of
// classes.
__device__ __forceinline__ void place(const Work& work) {
  __shared__ unsigned sums[2][kThreads];
  const SmallestPerClassArgs& a = work.args;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t run = (a.classes + kThreads - 1) / kThreads;
  const int64_t begin = thread * run;
  const int64_t end = begin + run < a.classes ? begin + run : a.classes;
  unsigned sum = 0;
  for (int64_t c = begin; c < end; ++c) sum += __ldcg(work.scratch.sizes + c);
  int from = 0;
  sums[from][thread] = sum;
  __syncthreads();
  for (int reach = 1; reach < kThreads; reach *= 2) {
    sums[1 - from][thread] = sums[from][thread] + (thread >= reach ? sums[from][thread - reach] : 0u);
    from = 1 - from;
    __syncthreads();
  }
  unsigned start = sums[from][thread] - sum;
  for (int64_t c = begin; c < end; ++c) {
    const unsigned size = __ldcg(work.scratch.sizes + c);
    work.scratch.starts[c] = start;
    work.scratch.next[c] = start;
    work.counts[c] = size < a.k ? size : a.k;
    start += size;
  }
}

// Computes the number of selectable samples of each class, and where the keys of each class go.
// A block owns kTile samples; the last one to be done, all classes.
// Reads scores and labels; adds to `sizes`, once a class and block where the classes fit shared memory.
// Accumulates integers: any order gives the same.
__global__ void __launch_bounds__(kThreads) count_kernel(const Work work, unsigned blocks) {
  __shared__ unsigned local[kSharedClasses];
  __shared__ bool is_last;
  const SmallestPerClassArgs& a = work.args;
  const bool shared = a.classes <= kSharedClasses;
  if (shared) clear(local, a.classes);
  unsigned* sizes = shared ? local : work.scratch.sizes;
  for_each_sample(a, [&](int64_t, int64_t label) { atomicAdd(sizes + label, 1u); });
  if (shared) {
    __syncthreads();
    for (int64_t c = threadIdx.x; c < a.classes; c += kThreads) {
      if (local[c] != 0) atomicAdd(work.scratch.sizes + c, local[c]);
    }
  }
  __threadfence();  // this thread's counts are there before its block takes a ticket
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(work.scratch.done, 1u) == blocks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  place(work);
}

// Computes the key of every selectable sample, among those of its class.
// A block owns kTile samples, and takes the places of a class for all of them at once.
// Reads scores and labels (again from cache); writes 8 bytes a sample.
// Accumulates nothing.
__global__ void __launch_bounds__(kThreads) deal_kernel(const Work work) {
  __shared__ unsigned local[kSharedClasses];
  const SmallestPerClassArgs& a = work.args;
  const bool shared = a.classes <= kSharedClasses;
  if (shared) {
    clear(local, a.classes);
    for_each_sample(a, [&](int64_t, int64_t label) { atomicAdd(local + label, 1u); });
    __syncthreads();
    for (int64_t c = threadIdx.x; c < a.classes; c += kThreads) {
      if (local[c] != 0) local[c] = atomicAdd(work.scratch.next + c, local[c]);
    }
    __syncthreads();
  }
  unsigned* next = shared ? local : work.scratch.next;
  for_each_sample(a, [&](int64_t i, int64_t label) {
    work.scratch.keys[atomicAdd(next + label, 1u)] = selection_key(a.scores[i], i);
  });
}

// The k-th smallest of `size` > k keys, the same in every thread: a digit of 8 bits a pass, from the top.
__device__ __forceinline__ uint64_t kth_smallest(const uint64_t* keys, unsigned size, unsigned k) {
  __shared__ unsigned histogram[256];
  __shared__ unsigned digit, below, equal;
  uint64_t prefix = 0, known = 0;  // the digits found so far, and the bits that they are
  unsigned rank = k;               // among the keys that share them
  for (int shift = 56; shift >= 0; shift -= 8) {
    clear(histogram, 256);
    for (unsigned i = threadIdx.x; i < size; i += kThreads) {
      const uint64_t key = keys[i];
      if ((key & known) == prefix) atomicAdd(histogram + ((key >> shift) & 255u), 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned d = 0, before = 0;
      while (before + histogram[d] < rank) before += histogram[d++];
      digit = d;
      below = before;
      equal = histogram[d];
    }
    __syncthreads();
    prefix |= static_cast<uint64_t>(digit) << shift;
    known |= static_cast<uint64_t>(255) << shift;
    rank -= below;
    const bool all = rank == equal;  // every key with these digits is taken: the largest of them need not be known
    __syncthreads();
    if (all) return prefix | ~known;
  }
  return prefix;
}

// Sorts `size` keys ascending by a bitonic network in which every comparator puts the smaller key first, so that keys
// past the end stand for infinity and are left out.
__device__ __forceinline__ void sort(uint64_t* keys, unsigned size) {
  const auto order = [&](uint64_t low, uint64_t high) {
    if (high >= size || keys[low] <= keys[high]) return;
    const uint64_t larger = keys[low];
    keys[low] = keys[high];
    keys[high] = larger;
  };
  uint64_t padded = 1;
  while (padded < size) padded *= 2;
  for (uint64_t half = 1; half < padded; half *= 2) {
    for (uint64_t pair = threadIdx.x; pair < padded / 2; pair += kThreads) {
      const uint64_t group = pair / half * 2 * half, j = pair % half;
      order(group + j, group + 2 * half - 1 - j);
    }
    __syncthreads();
    for (uint64_t stride = half / 2; stride > 0; stride /= 2) {
      for (uint64_t pair = threadIdx.x; pair < padded / 2; pair += kThreads) {
        const uint64_t low = pair / stride * 2 * stride + pair % stride;
        order(low, low + stride);
      }
      __syncthreads();
    }
  }
}

// Computes the selected indices of a class, in order, and -1 after them.
// A block owns a class, and a row of `indices`, in which keys are gathered and sorted before indices replace them.
// Reads the keys of the class up to 9 times, from L2 mostly; writes 8 bytes a selected sample.
// Accumulates nothing.
__global__ void __launch_bounds__(kThreads) select_kernel(const Work work) {
  __shared__ unsigned taken;
  const SmallestPerClassArgs& a = work.args;
  const int64_t label = blockIdx.x;
  const uint64_t* keys = work.scratch.keys + work.scratch.starts[label];
  const unsigned size = work.scratch.sizes[label];
  const auto k = static_cast<unsigned>(a.k);
  auto* row = reinterpret_cast<uint64_t*>(work.indices + label * a.k);
  const unsigned selected = size < k ? size : k;
  if (threadIdx.x == 0) taken = 0;
  __syncthreads();
  const uint64_t last = size > k ? kth_smallest(keys, size, k) : ~static_cast<uint64_t>(0);
  for (unsigned i = threadIdx.x; i < size; i += kThreads) {
    const uint64_t key = keys[i];
    if (key <= last) row[atomicAdd(&taken, 1u)] = key;
  }
  for (unsigned i = selected + threadIdx.x; i < k; i += kThreads) row[i] = ~static_cast<uint64_t>(0);
  __syncthreads();
  sort(row, selected);
  for (unsigned i = threadIdx.x; i < selected; i += kThreads) row[i] = static_cast<uint64_t>(selected_index(row[i]));
}

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

void smallest_per_class_cuda(const SmallestPerClassArgs& args, const SmallestPerClassScratch& scratch, int64_t* indices,
                             int64_t* counts, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Work work = {args, scratch, indices, counts};
  const int tiles = args.count > 0 ? static_cast<int>((args.count + kTile - 1) / kTile) : 1;
  BDFAST_LAUNCH(count_kernel, tiles, kThreads, queue, work, static_cast<unsigned>(tiles));
  check_cuda(cudaGetLastError(), kOp, "count_kernel");
  BDFAST_LAUNCH(deal_kernel, tiles, kThreads, queue, work);
  check_cuda(cudaGetLastError(), kOp, "deal_kernel");
  BDFAST_LAUNCH(select_kernel, static_cast<int>(args.classes), kThreads, queue, work);
  check_cuda(cudaGetLastError(), kOp, "select_kernel");
}

}  // namespace bdfast
