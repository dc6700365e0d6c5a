// Square patches of images [N, C, H, W]: which pixels an image's patch has, and values given for all channels or for each.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bdfast {

struct ImageStrides {  // in elements
  int64_t sample, channel, row, column;
};

struct PatchGeometry {
  int64_t samples, channels, height, width;
  int64_t radius;       // half-width, at most max(height, width); negative: every patch is its whole image
  const void* centers;  // [N, 2] (row, column) of int64_t or int32_t, anywhere; not read where radius < 0
  bool wide_centers;    // int64_t
  int64_t center_stride, coordinate_stride;
};

struct Patch {  // half open
  int64_t top, bottom, left, right;
};

struct ChannelValue {
  float value;              // where of_channel is null
  const float* of_channel;  // [C]
};

namespace BDFAST_ISA_NAMESPACE {

BDFAST_HOST_DEVICE int64_t center_at(const PatchGeometry& g, int64_t sample, int64_t coordinate) {
  const int64_t at = sample * g.center_stride + coordinate * g.coordinate_stride;
  return g.wide_centers ? static_cast<const int64_t*>(g.centers)[at] : static_cast<const int32_t*>(g.centers)[at];
}

// [center - radius, center + radius] cut at [0, size): empty where the center lies further outside than the radius.
BDFAST_HOST_DEVICE void cut_side(int64_t center, int64_t radius, int64_t size, int64_t& begin, int64_t& end) {
  if (center < -radius - 1) center = -radius - 1;  // before adding: centers may be anything that an int64_t holds
  if (center > size + radius) center = size + radius;
  begin = center - radius > 0 ? center - radius : 0;
  end = center + radius + 1 < size ? center + radius + 1 : size;
  if (end < begin) end = begin;
}

BDFAST_HOST_DEVICE Patch patch_of(const PatchGeometry& g, int64_t sample) {
  if (g.radius < 0) return {0, g.height, 0, g.width};
  Patch patch;
  cut_side(center_at(g, sample, 0), g.radius, g.height, patch.top, patch.bottom);
  cut_side(center_at(g, sample, 1), g.radius, g.width, patch.left, patch.right);
  return patch;
}

BDFAST_HOST_DEVICE float channel_value(const ChannelValue& v, int64_t channel) {
  return v.of_channel != nullptr ? v.of_channel[channel] : v.value;
}

// As torch.clamp: the upper bound wins where they cross, and NaN stays NaN.
BDFAST_HOST_DEVICE float clamped(float value, float lower, float upper) {
  value = lower > value ? lower : value;
  return upper < value ? upper : value;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
