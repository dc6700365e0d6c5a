// masked_pgd_step_: one projected step along the sign of the gradient inside each image's patch.
//
//   v     = x_adv + step_size * sign(grad)             sign(0) = sign(NaN) = 0
//   x_adv = clamp(clamp(v, x - eps, x + eps), lower, upper)
#pragma once

#include "dtype.h"
#include "patch.h"

namespace bdfast {

struct MaskedPgdStepArgs {
  void* x_adv;
  const void* x;
  const void* grad;
  DType dtype;
  ImageStrides x_adv_strides, x_strides, grad_strides;
  PatchGeometry geometry;
  ChannelValue step_size, eps, lower, upper;
};

namespace BDFAST_ISA_NAMESPACE {

struct PgdBounds {  // of one channel
  float step_size, eps, lower, upper;
};

BDFAST_HOST_DEVICE PgdBounds bounds_of_channel(const MaskedPgdStepArgs& a, int64_t channel) {
  PgdBounds b = {channel_value(a.step_size, channel), channel_value(a.eps, channel), channel_value(a.lower, channel),
                 channel_value(a.upper, channel)};
  // A bound that is NaN gives NaN, by way of eps, which every element looks at anyway.
  if (b.lower != b.lower || b.upper != b.upper || b.step_size != b.step_size) b.eps = b.lower + b.upper + b.step_size;
  return b;
}

// The product with the sign is exact: contraction to a fused multiply-add does not change a bit.
BDFAST_HOST_DEVICE float pgd_step(float x_adv, float x, float grad, const PgdBounds& b) {
  const float sign = (grad > 0.0f ? 1.0f : 0.0f) - (grad < 0.0f ? 1.0f : 0.0f);
  const float lowest = x - b.eps;
  const float v = clamped(clamped(x_adv + sign * b.step_size, lowest, x + b.eps), b.lower, b.upper);
  return lowest != lowest ? lowest : v;  // clamped() passes over a NaN bound
}

}  // namespace BDFAST_ISA_NAMESPACE

BDFAST_DECLARE_CPU_KERNEL(void masked_pgd_step(const MaskedPgdStepArgs& args))

}  // namespace bdfast
