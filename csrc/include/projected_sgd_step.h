// projected_sgd_step_: D3's whole update of the projected layers. The scalar rules, shared by host and device.
//
//   d   = ||W - W0||                                     (measured, or carried over from the step before)
//   V   = momentum * V + G - (distance_weight / d) (W - W0)
//   W~  = W - lr * V
//   W   = W~ * norm / ||W~||
#pragma once

#include <cmath>
#include <cstdint>

#include "isa.h"

namespace bdfast {

struct ProjectedSgdSegment {  // one layer
  float* weight;              // W   [numel]
  const float* anchor;        // W0  [numel]
  const float* grad;          // G   [numel]
  float* momentum;            // V   [numel]
  int64_t numel;
};

struct ProjectedSgdScalars {
  float lr;
  float momentum;
  float distance_weight;
};

namespace BDFAST_ISA_NAMESPACE {

// The sums of squares and products that decide projection and next distance, all in float64.
struct ProjectedSgdSums {
  double weight_weight;  // <W~, W~>
  double weight_anchor;  // <W~, W0>
  double anchor_anchor;  // <W0, W0>
};

// distance_weight / d, or 0 where d is within rounding of 0: the norm has no gradient there, and dividing by noise would
// push in a random direction at full strength. After a float32 projection that noise is about 6e-8 of the norm.
BDFAST_HOST_DEVICE float distance_pull(double distance, float norm, float distance_weight) {
  constexpr double float32_epsilon = 1.1920928955078125e-07;
  return distance < 4.0 * float32_epsilon * static_cast<double>(norm)
             ? 0.0f
             : static_cast<float>(static_cast<double>(distance_weight) / distance);
}

// A carried distance that is not positive (or is NaN) stands for "not known yet": it is measured.
BDFAST_HOST_DEVICE bool distance_is_known(float distance) { return distance > 0.0f; }

BDFAST_HOST_DEVICE float updated_momentum(float weight, float anchor, float grad, float momentum, float pull,
                                          float momentum_factor) {
  return momentum_factor * momentum + (grad - pull * (weight - anchor));
}

// norm / ||W~||; 1 for W~ = 0, which has no direction to project along; NaN for a norm that is not finite.
BDFAST_HOST_DEVICE double projection_scale(double weight_weight, float norm) {
  if (weight_weight == 0.0) return 1.0;
  const double length = sqrt(weight_weight);
  return length - length == 0.0 ? static_cast<double>(norm) / length : length - length;
}

// Near the anchor, |scale W~ - W0|^2 cancels in the expansion below and has to be summed directly.
BDFAST_HOST_DEVICE bool distance_needs_direct_sum(const ProjectedSgdSums& sums, double scale) {
  return scale * sums.weight_anchor > 0.99 * sums.anchor_anchor;
}

BDFAST_HOST_DEVICE float expanded_distance(const ProjectedSgdSums& sums, double scale) {
  const double squared = scale * scale * sums.weight_weight - 2.0 * scale * sums.weight_anchor + sums.anchor_anchor;
  return static_cast<float>(sqrt(squared > 0.0 || squared != squared ? squared : 0.0));
}

}  // namespace BDFAST_ISA_NAMESPACE

// `norms` [count]; `distances` [count] or null: read as the distances before the step where positive, and replaced by
// those after it.
BDFAST_DECLARE_CPU_KERNEL(void projected_sgd_step(const ProjectedSgdSegment* segments, int64_t count,
                                                  const ProjectedSgdScalars& scalars, const float* norms,
                                                  float* distances))

}  // namespace bdfast
