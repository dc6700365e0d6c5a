// projected_sgd_step_ on the GPU: what follows from the sums over a layer, the same in every thread.
#pragma once

#include "projected_sgd_step.h"
#include "projected_sgd_step_passes.cuh"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

struct Decision {
  ProjectedSgdSums sums;
  float pull;
  double scale;
  bool direct;    // the next distance has to be summed over the projected weights
  bool resolved;  // false: W~ nearly cancels, and its norm has to be summed over the stepped weights themselves
};

__device__ __forceinline__ Decision decide_carried(const double (&sums)[3], float norm, bool wants_distance) {
  Decision d = {{sums[0], sums[1], sums[2]}, 0.0f, projection_scale(sums[0], norm), false, true};
  d.direct = wants_distance && distance_needs_direct_sum(d.sums, d.scale);
  return d;
}

__device__ __forceinline__ Decision decide_measured(const double (&g)[kGram], float norm, float lr,
                                                    const ProjectedSgdScalars& scalars, bool wants_distance) {
  const double ww = g[0], wd = g[1], wg = g[2], wv = g[3], dd = g[4], dg = g[5], dv = g[6], gg = g[7], gv = g[8],
               vv = g[9];
  const float pull = distance_pull(sqrt(dd), norm, scalars.distance_weight);
  // W~ = W + a D + b G + c V
  const double a = static_cast<double>(lr) * pull, b = -static_cast<double>(lr), c = b * scalars.momentum;
  const double squares = ww + a * a * dd + b * b * gg + c * c * vv;
  const double stepped = squares + 2.0 * (a * wd + b * wg + c * wv + a * b * dg + a * c * dv + b * c * gv);
  const double along_w = ww + a * wd + b * wg + c * wv;
  const double along_d = wd + a * dd + b * dg + c * dv;
  Decision d = {{stepped, along_w - along_d, ww - 2.0 * wd + dd}, pull, 1.0, false, true};
  // Below a hundredth of its terms, ||W~|| is made of their float32 rounding, which the products do not see; nor do they
  // see an overflow of float32. A NaN is neither, and takes the ordinary way.
  const double momentum = scalars.momentum, strength = pull;
  const double largest = squares + gg + momentum * momentum * vv + strength * strength * dd;
  d.resolved = !(stepped < 1e-4 * squares || largest > 1e70);
  d.scale = projection_scale(stepped, norm);
  d.direct = wants_distance && distance_needs_direct_sum(d.sums, d.scale);
  return d;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
