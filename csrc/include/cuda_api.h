// What the CUDA sources offer to the bindings; no CUDA header, so that any C++ compiler reads it.
#pragma once

#include <cstdint>

#include "projected_sgd_step.h"

namespace bdfast {

// Doubles of scratch that projected_sgd_step_cuda needs for layers of these sizes on the current device; may be 0.
int64_t projected_sgd_step_scratch(const int64_t* numels, int64_t count);

// Queues the step on `stream`, a cudaStream_t of the current device. All pointers are on the device except `segments`
// itself. `lr` replaces scalars.lr where it is not null; `distances` may be null; `scratch` needs no initial value.
// Throws std::runtime_error where a launch fails.
void projected_sgd_step_cuda(const ProjectedSgdSegment* segments, int64_t count, const ProjectedSgdScalars& scalars,
                             const float* lr, const float* norms, float* distances, double* scratch, void* stream);

}  // namespace bdfast
