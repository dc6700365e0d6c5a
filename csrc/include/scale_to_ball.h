// scale_to_ball_: shrinks each image's perturbation to a ball around 0.
//
//   d = d * min(1, radius / ||d||_p),   p in {1, 2}
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"

namespace bdfast {

struct ScaleToBallArgs {
  void* perturbation;  // [images, numel]
  DType dtype;
  int64_t images, numel;
  double radius;       // where radii is null
  const float* radii;  // [images]
  bool one_norm;       // p = 1, else 2
};

namespace BDFAST_ISA_NAMESPACE {

BDFAST_HOST_DEVICE double norm_term(float value, bool one_norm) {
  const double v = static_cast<double>(value);
  return one_norm ? (v < 0.0 ? -v : v) : v * v;
}

// 1 inside the ball, where nothing is to be written; NaN for a norm or radius that is NaN.
BDFAST_HOST_DEVICE double ball_scale(const ScaleToBallArgs& a, int64_t image, double terms) {
  const double norm = a.one_norm ? terms : sqrt(terms);
  const double given = a.radii != nullptr ? static_cast<double>(a.radii[image]) : a.radius;
  const double radius = given < 0.0 ? 0.0 : given;
  return norm <= radius ? 1.0 : radius / norm;
}

BDFAST_HOST_DEVICE float scaled(float value, double scale) {
  return static_cast<float>(scale * static_cast<double>(value));
}

}  // namespace BDFAST_ISA_NAMESPACE

BDFAST_DECLARE_CPU_KERNEL(void scale_to_ball(const ScaleToBallArgs& args))

}  // namespace bdfast
