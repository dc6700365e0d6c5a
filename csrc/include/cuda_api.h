// What the CUDA sources offer to the bindings; no CUDA header, so that any C++ compiler reads it.
#pragma once

#include <cstdint>

#include "histogram_entropy.h"
#include "masked_pgd_step.h"
#include "masked_random_start.h"
#include "patch_centers.h"
#include "projected_sgd_step.h"
#include "scale_to_ball.h"
#include "smallest_per_class.h"

namespace bdfast {

// Doubles of scratch that projected_sgd_step_cuda needs for layers of these sizes on the current device; may be 0.
int64_t projected_sgd_step_scratch(const int64_t* numels, int64_t count);

// Queues the step on `stream`, a cudaStream_t of the current device. All pointers are on the device except `segments`
// itself. `lr` replaces scalars.lr where it is not null; `distances` may be null; `scratch` needs no initial value.
// Throws std::runtime_error where a launch fails.
void projected_sgd_step_cuda(const ProjectedSgdSegment* segments, int64_t count, const ProjectedSgdScalars& scalars,
                             const float* lr, const float* norms, float* distances, double* scratch, void* stream);

struct SmallestPerClassScratch {
  uint64_t* keys;    // [N]
  unsigned* sizes;   // [C], zeros
  unsigned* done;    // one, zero
  unsigned* starts;  // [C]
  unsigned* next;    // [C]
};

// Queues the selection on `stream`, a cudaStream_t of the current device; writes what the CPU kernel writes, except that
// samples whose label is outside [0, C) are left out. Throws std::runtime_error where a launch fails.
void smallest_per_class_cuda(const SmallestPerClassArgs& args, const SmallestPerClassScratch& scratch, int64_t* indices,
                             int64_t* counts, void* stream);

// Queue the op on `stream`, a cudaStream_t of the current device; all pointers in `args` are on the device. An image that
// has a patch has fewer than 2^31 elements. Throw std::runtime_error where a launch fails.
void masked_pgd_step_cuda(const MaskedPgdStepArgs& args, void* stream);
void patch_centers_cuda(const PatchCentersArgs& args, int32_t* centers, void* stream);

// Likewise; x has the strides of x_adv, and may be x_adv itself. Outside of the patches x_adv keeps what it holds.
void masked_random_start_cuda(const MaskedRandomStartArgs& args, const void* x, void* stream);

// Most parts of an image that scale_to_ball_cuda takes.
constexpr int64_t kScaleToBallParts = 512;

// Likewise. With more than one part an image is cut into so many, images * parts < 2^31, and `partials` is scratch for a
// double a part, which needs no initial value.
void scale_to_ball_cuda(const ScaleToBallArgs& args, int64_t parts, double* partials, void* stream);

// Most parts of x whose range is looked for apart.
constexpr int64_t kHistogramEntropyParts = 256;

// Queues the op on `stream`, a cudaStream_t of the current device; x is float32, `parts` scratch for three floats a part,
// and `terms` is not read.
// Entropies are NaN where the CPU kernel returns something else than a number of bins up to kMostBins.
// Throws std::runtime_error where a launch fails.
void histogram_entropy_cuda(const HistogramEntropyArgs& args, float* parts, float* entropy, void* stream);

}  // namespace bdfast
