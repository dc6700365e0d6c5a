// What Python hands over for images: shapes, strides, patches, values by channel.
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "addresses.h"
#include "patch.h"

namespace bdfast {
namespace {

using Four = std::array<int64_t, 4>;

ImageStrides image_strides(const Four& s) { return {s[0], s[1], s[2], s[3]}; }

using Centers = std::tuple<uintptr_t, bool, int64_t, int64_t>;  // address, int64, strides of samples and coordinates
using PerChannel = std::pair<float, uintptr_t>;  // one value, or where there is one for each channel; else 0

PatchGeometry patch_geometry(const Four& shape, int64_t radius, const Centers& c) {
  return {shape[0],       shape[1],       shape[2],      shape[3], radius, pointer<const void>(std::get<0>(c)),
          std::get<1>(c), std::get<2>(c), std::get<3>(c)};
}

ChannelValue channel_value_of(const PerChannel& value) { return {value.first, pointer<const float>(value.second)}; }

}  // namespace
}  // namespace bdfast
