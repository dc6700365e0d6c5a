// masked_random_start: uniform noise inside each image's patch, from a counter-based generator.
//
//   x_adv = clamp(x + eps * u, lower, upper),   u uniform over the 2^24 multiples of 2^-23 in [-1, 1)
//
// Counter: (sample id, number of the quad); a quad is four pixels of one row and channel, from a column that is a multiple
// of four, and word j is for its j-th pixel. Neither the patch nor the order of memory has a say in it.
#pragma once

#include "dtype.h"
#include "patch.h"
#include "philox.h"

namespace bdfast {

struct MaskedRandomStartArgs {
  void* x_adv;  // holds x on entry
  DType dtype;
  ImageStrides strides;
  PatchGeometry geometry;
  const int64_t* ids;  // [N]
  uint64_t key;
  ChannelValue eps, lower, upper;
};

namespace BDFAST_ISA_NAMESPACE {

struct NoiseBounds {  // of one channel
  float eps, lower, upper;
};

BDFAST_HOST_DEVICE NoiseBounds noise_of_channel(const MaskedRandomStartArgs& a, int64_t channel) {
  NoiseBounds b = {channel_value(a.eps, channel), channel_value(a.lower, channel), channel_value(a.upper, channel)};
  if (b.lower != b.lower || b.upper != b.upper) b.eps = b.lower + b.upper;  // a NaN bound gives NaN
  return b;
}

BDFAST_HOST_DEVICE int64_t quads_of_row(int64_t width) { return (width + 3) / 4; }

// The product of two floats is exact in float64: contraction to a fused multiply-add does not change a bit.
BDFAST_HOST_DEVICE float with_noise(float x, uint32_t word, const NoiseBounds& b) {
  const double noise = static_cast<double>(b.eps) * static_cast<double>(uniform_symmetric(word));
  return clamped(static_cast<float>(static_cast<double>(x) + noise), b.lower, b.upper);
}

}  // namespace BDFAST_ISA_NAMESPACE

BDFAST_DECLARE_CPU_KERNEL(void masked_random_start(const MaskedRandomStartArgs& args))

}  // namespace bdfast
