// 3x3 convolutions of stride 1 by Winograd's F(4x4, 3x3), on the CPU: a quarter of the products.
//
//   y = relu(conv(x, w) + bias + shortcut),   each of the last three where it is given
//
// The gradient to x is the same convolution with the weights turned by 180 degrees and their channels exchanged; that of
// what the ReLU was taken of is 0 where `output`, its result, is not positive.
// bdfast/runtime/winograd.py is the one caller; winograd_tile.h has the equations.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bdfast {

struct WinogradConv {
  const void* x;       // [N, height, width, channels] of `dtype`
  const void* output;  // like x, which counts as 0 where this is <= 0; or null
  DType dtype;         // float32 or bfloat16
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;      // at least 16
  int64_t padding;       // 0, 1 or 2 zeros around
  const float* weights;  // as winograd_pack left them
  const float* bias;     // [outputs], or null
  const void* shortcut;  // like y, or null
  bool relu;
  void* y;          // [N, height + 2 padding - 2, width + 2 padding - 2, outputs]
  int64_t outputs;  // at least 16
};

struct WinogradPack {
  const float* weight;  // [outputs, channels, 3, 3]
  int64_t stride[4];
  int64_t outputs;
  int64_t channels;
  bool gradient;  // for the gradient to x, of a convolution from `outputs` to `channels`
  float* packed;  // [36, panels, channels, columns of a panel]; channels and outputs exchanged for the gradient
};

struct WinogradWeightGradient {
  const void* x;  // as in WinogradConv
  DType dtype;
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;
  int64_t padding;
  const void* grad;  // like y
  int64_t outputs;
  float* grad_weight;  // [outputs, channels, 3, 3]
  int64_t stride[4];
};

// Floats of `packed`; they depend on the instruction set.
BDFAST_DECLARE_CPU_KERNEL(int64_t winograd_packed(int64_t outputs, int64_t channels))
BDFAST_DECLARE_CPU_KERNEL(void winograd_pack(const WinogradPack& args))
BDFAST_DECLARE_CPU_KERNEL(void winograd_conv(const WinogradConv& args))
BDFAST_DECLARE_CPU_KERNEL(void winograd_weight_gradient(const WinogradWeightGradient& args))

}  // namespace bdfast
