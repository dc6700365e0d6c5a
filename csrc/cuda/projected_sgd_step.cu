// projected_sgd_step_ on the GPU: one launch for small layers, two for large ones.
//
// The update and its scalar rules are stated in projected_sgd_step.h, what a thread does to its weights in
// projected_sgd_step_passes.cuh, what follows from the sums in projected_sgd_step_decisions.cuh. The projection needs
// ||W~|| of the whole layer before it can write any weight, so large layers take two launches:
//
//   accumulate   distance carried: writes V and W~, sums <W~,W~>, <W~,W0>, <W0,W0>              24 bytes a weight
//                distance unknown: sums the 10 products of W, D = W - W0, G, V; writes nothing  16
//   project      adds the sums up, then
//                distance carried: W = scale W~                                                  8
//                distance unknown: d = ||D||, so V, W~ and W in one go                           24
//
// W~ = W + lr pull D - lr G - lr momentum V is linear in the four, so their products give <W~,W~> and <W~,W0> too.
//
// Every block of `project` adds the sums of its layer itself, in the order of the blocks: no counter has to start at zero
// in fresh scratch, which would take a third entry in the stream, and reruns agree to the bit. What can only be known
// after the projection (the distance near the anchor, or a norm that the products do not resolve) is finished by the last
// block of the layer to arrive, counted by a ticket that `accumulate` has zeroed.
#include <algorithm>
#include <cstdint>

#include "cuda_api.h"
#include "cuda_launch.h"
#include "cuda_quad.cuh"
#include "cuda_reduce.cuh"
#include "projected_sgd_step.h"
#include "projected_sgd_step_decisions.cuh"
#include "projected_sgd_step_passes.cuh"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr const char* kOp = "projected_sgd_step_";
constexpr int kMaxSegments = 64;            // of one group: as many as fit the 4 KB of kernel parameters
constexpr int64_t kSmallNumel = 32 * 1024;  // up to here a layer is one block's work; not yet measured
constexpr int kSmallThreads = 1024;
constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 3;  // resident together: up to 80 registers a thread

struct Group {
  ProjectedSgdSegment segments[kMaxSegments];
  int first_block[kMaxSegments + 1];  // of each segment, in the grid of both large kernels
  int count;
  ProjectedSgdScalars scalars;
  const float* lr;     // null: scalars.lr
  const float* norms;  // [count]
  float* distances;    // [count] or null
  double* scratch;
};
static_assert(sizeof(Group) <= 4096, "kernel parameters");

// Scratch: per segment whether its distance was carried and a ticket, then sums by block, each kind side by side.
enum : int { kKnown = 0, kTicket = kMaxSegments, kPartials = 2 * kMaxSegments, kPartialKinds = kGram + 1 };

__device__ __forceinline__ double* partials(const Group& group, int kind) {
  return group.scratch + kPartials + static_cast<int64_t>(kind) * group.first_block[group.count];
}

__device__ __forceinline__ float learning_rate(const Group& group) {
  return group.lr != nullptr ? *group.lr : group.scalars.lr;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

// Computes the whole step.
// A block owns one segment.
// Reads W, W0, G, V once from memory and again from cache; writes V, W~ and W.
// Accumulates in float64: by thread, by warp, by block, always in the same order.
__global__ void __launch_bounds__(kSmallThreads) small_kernel(const __grid_constant__ Group group) {
  const int j = static_cast<int>(blockIdx.x);
  const ProjectedSgdSegment& s = group.segments[j];
  const Quads quads = {s.numel, static_cast<int64_t>(threadIdx.x), kSmallThreads, is_aligned(s)};
  const float norm = group.norms[j];
  const float carried = group.distances != nullptr ? group.distances[j] : 0.0f;
  double distance = carried;
  if (!distance_is_known(carried)) {
    double squared[1] = {measure(s, quads)};
    block_sum<kSmallThreads>(squared);
    distance = sqrt(squared[0]);
  }
  const float pull = distance_pull(distance, norm, group.scalars.distance_weight);
  double sums[3] = {0.0, 0.0, 0.0};
  update<Cache::keep>(s, quads, pull, learning_rate(group), group.scalars.momentum, sums);
  block_sum<kSmallThreads>(sums);
  const Decision d = decide_carried(sums, norm, group.distances != nullptr);
  float next = expanded_distance(d.sums, d.scale);
  if (d.direct) {
    double squared[1] = {project_and_measure<Cache::keep>(s, quads, d.scale)};
    block_sum<kSmallThreads>(squared);
    next = static_cast<float>(sqrt(squared[0]));
  } else {
    project<Cache::keep>(s, quads, d.scale);
  }
  if (threadIdx.x == 0 && group.distances != nullptr) group.distances[j] = next;
}

struct Place {  // of a block
  int segment;
  int first;   // block of its segment
  int blocks;  // of its segment
};

__device__ __forceinline__ Place place_of_block(const Group& group) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = group.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (group.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, group.first_block[low], group.first_block[low + 1] - group.first_block[low]};
}

__device__ __forceinline__ Quads share_of_thread(const ProjectedSgdSegment& s, const Place& at) {
  const int64_t block = static_cast<int>(blockIdx.x) - at.first;
  return {s.numel, block * kThreads + static_cast<int>(threadIdx.x), static_cast<int64_t>(at.blocks) * kThreads,
          is_aligned(s)};
}

template <int kCount>
__device__ __forceinline__ void leave_partials(const Group& group, double (&sums)[kCount], int first_kind) {
  block_sum<kThreads>(sums);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) partials(group, first_kind + k)[blockIdx.x] = sums[k];
}

// The sums over all blocks of a segment, in every thread; `global` reads see what other blocks of this launch wrote.
template <int kCount>
__device__ __forceinline__ void gather_partials(const Group& group, const Place& at, double (&sums)[kCount],
                                                int first_kind) {
  const double* of_block = partials(group, first_kind) + at.first;
  const int64_t between_kinds = group.first_block[group.count];
#pragma unroll
  for (int k = 0; k < kCount; ++k) sums[k] = 0.0;
#pragma unroll 1
  for (int b = static_cast<int>(threadIdx.x); b < at.blocks; b += kThreads) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sums[k] += read<Cache::global>(of_block + k * between_kinds + b);
  }
  block_sum<kThreads>(sums);
}

// Computes V and W~ and their sums where the distance is carried, the products of the inputs where it is not.
// A block owns every blocks-th run of 1024 weights of one segment.
// Reads W, W0, G, V; writes V and W~ (carried), or nothing.
// Accumulates in float64: by thread, by warp, by block.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    accumulate_kernel(const __grid_constant__ Group group) {
  const Place at = place_of_block(group);
  const ProjectedSgdSegment& s = group.segments[at.segment];
  const Quads quads = share_of_thread(s, at);
  const float carried = group.distances != nullptr ? group.distances[at.segment] : 0.0f;
  const bool known = distance_is_known(carried) || s.numel == 0;  // nothing to measure in an empty layer
  if (static_cast<int>(blockIdx.x) == at.first && threadIdx.x == 0) {
    group.scratch[kKnown + at.segment] = known ? 1.0 : 0.0;
    *reinterpret_cast<unsigned*>(group.scratch + kTicket + at.segment) = 0;
  }
  if (known) {
    const float pull = distance_pull(carried, group.norms[at.segment], group.scalars.distance_weight);
    double sums[3] = {0.0, 0.0, 0.0};
    update<Cache::stream>(s, quads, pull, learning_rate(group), group.scalars.momentum, sums);
    leave_partials(group, sums, 0);
  } else {
    double sums[kGram] = {};
    gram(s, quads, sums);
    leave_partials(group, sums, 0);
  }
}

// Computes W (and V, where the distance was unknown) and the distances after the step.
// A block owns the same weights as in accumulate_kernel.
// Reads the sums of its segment's blocks, and W~, or W, W0, G, V; writes W, or V and W.
// Accumulates in float64; what needs all projected weights is finished by the last block of the segment.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    project_kernel(const __grid_constant__ Group group) {
  __shared__ bool is_last;
  const Place at = place_of_block(group);
  const ProjectedSgdSegment& s = group.segments[at.segment];
  const Quads quads = share_of_thread(s, at);
  const float norm = group.norms[at.segment];
  const float lr = learning_rate(group);
  const bool wants_distance = group.distances != nullptr;
  Decision d;
  double left[1] = {0.0};  // for the last block: squared distance, or squared norm where that is not resolved
  if (group.scratch[kKnown + at.segment] != 0.0) {
    double sums[3];
    gather_partials(group, at, sums, 0);
    d = decide_carried(sums, norm, wants_distance);
    if (d.direct) {
      left[0] = project_and_measure<Cache::stream>(s, quads, d.scale);
    } else {
      project<Cache::stream>(s, quads, d.scale);
    }
  } else {
    double sums[kGram];
    gather_partials(group, at, sums, 0);
    d = decide_measured(sums, norm, lr, group.scalars, wants_distance);
    if (d.resolved) {
      left[0] = update_and_project(s, quads, d.pull, lr, group.scalars.momentum, d.scale, d.direct);
    } else {
      double stepped[3] = {0.0, 0.0, 0.0};
      update<Cache::keep>(s, quads, d.pull, lr, group.scalars.momentum, stepped);
      left[0] = stepped[0];
    }
  }
  if (d.resolved && !d.direct) {
    if (wants_distance && static_cast<int>(blockIdx.x) == at.first && threadIdx.x == 0) {
      group.distances[at.segment] = expanded_distance(d.sums, d.scale);
    }
    return;
  }
  leave_partials(group, left, kGram);
  __threadfence();  // this thread's weights and partial sum are visible before its block takes a ticket
  __syncthreads();
  if (threadIdx.x == 0) {
    auto* ticket = reinterpret_cast<unsigned*>(group.scratch + kTicket + at.segment);
    is_last = atomicAdd(ticket, 1u) == static_cast<unsigned>(at.blocks - 1);
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  gather_partials(group, at, left, kGram);
  if (!d.resolved) {
    const Quads all = {s.numel, static_cast<int64_t>(threadIdx.x), kThreads, is_aligned(s)};
    left[0] = project_and_measure<Cache::global>(s, all, projection_scale(left[0], norm));
    block_sum<kThreads>(left);
  }
  if (wants_distance && threadIdx.x == 0) group.distances[at.segment] = static_cast<float>(sqrt(left[0]));
}

// --- host ------------------------------------------------------------------------------------------------------------

int64_t runs(int64_t numel) { return (numel + 4 * kThreads - 1) / (4 * kThreads); }  // of one quad a thread

bool all_small(const int64_t* numels, int count) {
  return std::all_of(numels, numels + count, [](int64_t numel) { return numel <= kSmallNumel; });
}

// Blocks of each segment: as many as have work, or a share by size of what the device holds at once.
void place_blocks(const int64_t* numels, int count, int (&first_block)[kMaxSegments + 1]) {
  int device = 0, multiprocessors = 0;
  check_cuda(cudaGetDevice(&device), kOp, "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kOp,
             "cudaDeviceGetAttribute");
  const double budget = static_cast<double>(multiprocessors) * kBlocksPerMultiprocessor;
  double wanted = 0.0;
  for (int j = 0; j < count; ++j) wanted += static_cast<double>(runs(numels[j]));
  const double share = std::min(1.0, budget / std::max(1.0, wanted));
  first_block[0] = 0;
  for (int j = 0; j < count; ++j) {
    const double blocks = std::max(1.0, share * static_cast<double>(runs(numels[j])));
    first_block[j + 1] = first_block[j] + static_cast<int>(blocks);
  }
}

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

int64_t projected_sgd_step_scratch(const int64_t* numels, int64_t count) {
  int64_t doubles = 0;
  for (int64_t begin = 0; begin < count; begin += kMaxSegments) {
    const int size = static_cast<int>(std::min<int64_t>(kMaxSegments, count - begin));
    if (all_small(numels + begin, size)) continue;
    int first_block[kMaxSegments + 1];
    place_blocks(numels + begin, size, first_block);
    doubles = std::max<int64_t>(doubles, kPartials + static_cast<int64_t>(kPartialKinds) * first_block[size]);
  }
  return doubles;
}

void projected_sgd_step_cuda(const ProjectedSgdSegment* segments, int64_t count, const ProjectedSgdScalars& scalars,
                             const float* lr, const float* norms, float* distances, double* scratch, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  for (int64_t begin = 0; begin < count; begin += kMaxSegments) {
    Group group = {};
    group.count = static_cast<int>(std::min<int64_t>(kMaxSegments, count - begin));
    group.scalars = scalars;
    group.lr = lr;
    group.norms = norms + begin;
    group.distances = distances != nullptr ? distances + begin : nullptr;
    group.scratch = scratch;
    int64_t numels[kMaxSegments];
    for (int j = 0; j < group.count; ++j) {
      group.segments[j] = segments[begin + j];
      numels[j] = segments[begin + j].numel;
    }
    if (all_small(numels, group.count)) {
      BDFAST_LAUNCH(small_kernel, group.count, kSmallThreads, queue, group);
      check_cuda(cudaGetLastError(), kOp, "small_kernel");
      continue;
    }
    place_blocks(numels, group.count, group.first_block);
    const int blocks = group.first_block[group.count];
    BDFAST_LAUNCH(accumulate_kernel, blocks, kThreads, queue, group);
    check_cuda(cudaGetLastError(), kOp, "accumulate_kernel");
    BDFAST_LAUNCH(project_kernel, blocks, kThreads, queue, group);
    check_cuda(cudaGetLastError(), kOp, "project_kernel");
  }
}

}  // namespace bdfast
