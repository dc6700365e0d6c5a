// histogram_entropy on the GPU: the range of x, then a block a row that counts in shared memory.
//
//   extrema    smallest and largest element of a part of x                                          4 bytes an element
//   entropy    range of all parts; counts of a row, 4,096 bins at a time; their terms               4 bytes an element
//
// The second read comes from the L2 cache where x fits. Counts are integers and terms are added in the order of threads:
// reruns are bit-identical. The host never waits: how many bins there are is known on the device alone.
#include <cmath>
#include <cstdint>

#include "cuda_api.h"
#include "cuda_launch.h"
#include "cuda_reduce.cuh"
#include "cuda_vector.cuh"
#include "histogram_entropy.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr const char* kOp = "histogram_entropy";
constexpr int kThreads = 256;
constexpr int kBatch = 4;        // loads of a thread that are on their way at a time
constexpr int64_t kPart = 1024;  // elements of a block while looking for the range, at least: a load a thread
constexpr int64_t kSharedBins = 4096;
constexpr float kInfinity = __builtin_inff();

// NaN is neither smaller nor larger than anything: it is noted apart.
struct Extrema {
  float low, high, nan;

  BDFAST_HOST_DEVICE static Extrema none() { return {kInfinity, -kInfinity, 0.0f}; }

  BDFAST_HOST_DEVICE void take(float smallest, float largest, float is_nan) {
    low = smallest < low ? smallest : low;
    high = largest > high ? largest : high;
    nan = is_nan > nan ? is_nan : nan;
  }
};

// The extrema of all threads of the block, in each of them.
__device__ __forceinline__ Extrema block_extrema(Extrema mine) {
  __shared__ Extrema shared[kThreads];
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      const Extrema other = shared[threadIdx.x + static_cast<unsigned>(half)];
      shared[threadIdx.x].take(other.low, other.high, other.nan);
    }
    __syncthreads();
  }
  return shared[0];
}

// A thread's elements of x[0, size), of which blocks take kVector at a time.
template <int kVector, class Body>
__device__ __forceinline__ void for_each_element(const float* x, int64_t size, const Body& body) {
  constexpr int64_t kStride = int64_t{kThreads} * kVector;
  for (int64_t first = int64_t{threadIdx.x} * kVector; first < size; first += kBatch * kStride) {
    Values<float, kVector> values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kStride < size) values[b] = load_values<float, kVector>(x + first + b * kStride);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (first + b * kStride < size) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) body(values[b].value[v]);
      }
    }
  }
}

// Computes the extrema of a part of x.
// A block owns `part` elements.
// Reads 4 bytes an element; writes 12 a block.
// Accumulates nothing that rounds.
template <int kVector>
__global__ void __launch_bounds__(kThreads) extrema_kernel(const float* x, int64_t count, int64_t part, float* parts) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * part;
  const int64_t left = count - begin;
  Extrema mine = Extrema::none();
  for_each_element<kVector>(x + begin, left < part ? left : part,
                            [&](float value) { mine.take(value, value, value != value ? 1.0f : 0.0f); });
  const Extrema all = block_extrema(mine);
  if (threadIdx.x == 0) {
    parts[3 * blockIdx.x] = all.low;
    parts[3 * blockIdx.x + 1] = all.high;
    parts[3 * blockIdx.x + 2] = all.nan;
  }
}

// Counts in `counts` what of the row lies in the bins [first, first + size).
template <int kVector, bool kStrict>
__device__ __forceinline__ void count_row(const float* row, int64_t columns, const Bins& bins, int64_t first,
                                          int64_t size, unsigned* counts) {
  for_each_element<kVector>(row, columns, [&](float value) {
    const int64_t place = bins.of<kStrict>(value) - first;
    if (place >= 0 && place < size) atomicAdd(counts + place, 1u);
  });
}

// -p log p of a bin with `count` of a row's elements, rounded as the usual loop in float32 does; 0 for an empty one.
__device__ __forceinline__ float term(unsigned count, float columns) {
  if (count == 0) return 0.0f;
  const float p = static_cast<float>(count) / columns;
  return -p * logf(p);
}

// Computes the entropy of a row.
// A block owns a row.
// Reads 4 bytes an element, for every 4,096 bins; writes 4 a row.
// Accumulates counts as integers, terms in float64.
template <int kVector>
__global__ void __launch_bounds__(kThreads)
    entropy_kernel(const HistogramEntropyArgs args, const float* parts, int part_count, float* entropy) {
  __shared__ unsigned counts[kSharedBins];
  Extrema mine = Extrema::none();
  for (int i = static_cast<int>(threadIdx.x); i < part_count; i += kThreads) {
    mine.take(parts[3 * i], parts[3 * i + 1], parts[3 * i + 2]);
  }
  const Extrema all = block_extrema(mine);
  const Bins bins(all.low, all.high, args.step, args.strict);
  const bool usable = all.nan == 0.0f && bins.count >= 0 && bins.count <= kMostBins;
  const float* row = static_cast<const float*>(args.x) + static_cast<int64_t>(blockIdx.x) * args.columns;
  double sum[1] = {0.0};
  for (int64_t first = 0; usable && first < bins.count; first += kSharedBins) {
    const int64_t left = bins.count - first;
    const int64_t size = left < kSharedBins ? left : kSharedBins;
    for (int64_t n = threadIdx.x; n < size; n += kThreads) counts[n] = 0;
    __syncthreads();
    if (args.strict) {
      count_row<kVector, true>(row, args.columns, bins, first, size, counts);
    } else {
      count_row<kVector, false>(row, args.columns, bins, first, size, counts);
    }
    __syncthreads();
    for (int64_t n = threadIdx.x; n < size; n += kThreads) {
      sum[0] += static_cast<double>(term(counts[n], static_cast<float>(args.columns)));
    }
    __syncthreads();
  }
  block_sum<kThreads>(sum);
  if (threadIdx.x == 0) entropy[blockIdx.x] = usable ? static_cast<float>(sum[0]) : kInfinity - kInfinity;
}

template <int kVector>
void launch(const HistogramEntropyArgs& args, int64_t part, float* parts, float* entropy, cudaStream_t queue) {
  const int64_t count = args.rows * args.columns;
  const int blocks = static_cast<int>((count + part - 1) / part);
  BDFAST_LAUNCH(extrema_kernel<kVector>, blocks, kThreads, queue, static_cast<const float*>(args.x), count, part,
                parts);
  check_cuda(cudaGetLastError(), kOp, "extrema_kernel");
  BDFAST_LAUNCH(entropy_kernel<kVector>, static_cast<int>(args.rows), kThreads, queue, args, parts, blocks, entropy);
  check_cuda(cudaGetLastError(), kOp, "entropy_kernel");
}

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

void histogram_entropy_cuda(const HistogramEntropyArgs& args, float* parts, float* entropy, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t even = (args.rows * args.columns + kHistogramEntropyParts - 1) / kHistogramEntropyParts;
  const int64_t part = even > kPart ? (even + 3) / 4 * 4 : kPart;
  const bool vectors = args.columns % 4 == 0 && reinterpret_cast<uintptr_t>(args.x) % sizeof(float4) == 0;
  if (vectors) {
    launch<4>(args, part, parts, entropy, queue);
  } else {
    launch<1>(args, part, parts, entropy, queue);
  }
}

}  // namespace bdfast
