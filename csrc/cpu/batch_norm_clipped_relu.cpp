// batch_norm_clipped_relu on the CPU.
//
// Computes   y = min(max(x * scale_c + shift_c, 0), bound_c), scale = weight / sqrt(var + eps), shift = bias - mean * scale
// A chunk    owns 16,384 consecutive elements, 512 at a time.
// Moves      reads x, writes y, and one bit an element for each gradient that will be wanted.
// Accumulates nothing; scale and shift are made in float64, elements are computed in float32.
#include "batch_norm_clipped_relu.h"

#include <cmath>
#include <vector>

#include "channel_clip.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

template <class T>
void forward(const BatchNormClippedReluArgs& a, T* y, float* scale, uint32_t* pass, uint32_t* clip) {
  const size_t channels = static_cast<size_t>(a.layout.channels);
  std::vector<float> shift(channels), bound(channels);
  for (size_t c = 0; c < channels; ++c) {
    const double weight = a.weight != nullptr ? a.weight[c] : 1.0;
    const double bias = a.bias != nullptr ? a.bias[c] : 0.0;
    const double factor = weight / std::sqrt(static_cast<double>(a.running_var[c]) + a.eps);
    scale[c] = static_cast<float>(factor);
    shift[c] = static_cast<float>(bias - a.running_mean[c] * factor);
    bound[c] = a.bound[a.bounds == 1 ? 0 : c];
  }
  if (a.layout.numel == 0) return;
  const ChannelValues bounds(a.layout, bound.data()), scales(a.layout, scale), shifts(a.layout, shift.data());
  clip_forward<T, true>(a.layout, static_cast<const T*>(a.x), bounds, &scales, &shifts, y, pass, clip);
}

}  // namespace

void batch_norm_clipped_relu_fwd(const BatchNormClippedReluArgs& args, void* y, float* scale, uint32_t* pass,
                                 uint32_t* clip) {
  switch (args.dtype) {
    case DType::float16:
      return forward(args, static_cast<Float16*>(y), scale, pass, clip);
    case DType::bfloat16:
      return forward(args, static_cast<BFloat16*>(y), scale, pass, clip);
    default:
      return forward(args, static_cast<float*>(y), scale, pass, clip);
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
