// winograd_conv: what bdfast._C offers of it.
#pragma once

#include <array>

#include "addresses.h"
#include "winograd_conv.h"

namespace bdfast {
namespace {

int64_t winograd_packed(int64_t outputs, int64_t channels) {
  return BDFAST_CALL_BEST(winograd_packed, outputs, channels);
}

using Strides = std::array<int64_t, 4>;

void winograd_pack(uintptr_t weight, const Strides& stride, int64_t outputs, int64_t channels, bool gradient,
                   uintptr_t packed) {
  const WinogradPack args{
      pointer<const float>(weight), {stride[0], stride[1], stride[2], stride[3]}, outputs, channels, gradient,
      pointer<float>(packed)};
  BDFAST_CALL_BEST(winograd_pack, args);
}

void winograd_conv(uintptr_t x, uintptr_t output, int dtype, int64_t images, int64_t height, int64_t width,
                   int64_t channels, int64_t padding, uintptr_t weights, uintptr_t bias, uintptr_t shortcut, bool relu,
                   uintptr_t y, int64_t outputs) {
  const WinogradConv args{pointer<const void>(x),
                          pointer<const void>(output),
                          static_cast<DType>(dtype),
                          images,
                          height,
                          width,
                          channels,
                          padding,
                          pointer<const float>(weights),
                          pointer<const float>(bias),
                          pointer<const void>(shortcut),
                          relu,
                          pointer<void>(y),
                          outputs};
  BDFAST_CALL_BEST(winograd_conv, args);
}

void winograd_weight_gradient(uintptr_t x, int dtype, int64_t images, int64_t height, int64_t width, int64_t channels,
                              int64_t padding, uintptr_t grad, int64_t outputs, uintptr_t grad_weight,
                              const Strides& stride) {
  const WinogradWeightGradient args{pointer<const void>(x),
                                    static_cast<DType>(dtype),
                                    images,
                                    height,
                                    width,
                                    channels,
                                    padding,
                                    pointer<const void>(grad),
                                    outputs,
                                    pointer<float>(grad_weight),
                                    {stride[0], stride[1], stride[2], stride[3]}};
  BDFAST_CALL_BEST(winograd_weight_gradient, args);
}

void bind_winograd_conv(py::module_& m) {
  m.def("winograd_packed", &winograd_packed);
  m.def("winograd_pack", &winograd_pack, nogil());
  m.def("winograd_conv", &winograd_conv, nogil());
  m.def("winograd_weight_gradient", &winograd_weight_gradient, nogil());
}

}  // namespace
}  // namespace bdfast
