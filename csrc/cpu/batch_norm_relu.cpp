// batch_norm_relu on the CPU: the two passes of channel_passes.h, forward and backward.
//
// Computes   what batch_norm_relu.h states.
// A chunk    owns whole channels, runs of planes or rows of columns: see channel_passes.h.
// Moves      forward: reads x twice and the shortcut, writes y; backward: reads x and a gradient twice, writes dx, and
//            with a shortcut reads y and writes g. The second read is of a cache where a channel fits in one.
// Accumulates in float32 about a pivot for some hundred values, and such sums in float64.
#include "batch_norm_relu.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "channel_passes.h"
#include "huge_pages.h"
#include "streaming.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

enum Row { kPivot, kScale, kShift, kInverse, kDelta };  // of `saved`
enum class Mask { none, from_x, from_y };               // where that of the ReLU comes from

// The backward finds the mask anew, and has to by the very same arithmetic.
inline float affine(float d, float scale, float shift) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(d, scale, shift);
#else
  return d * scale + shift;
#endif
}

// The largest number that T rounds to 0: half of the smallest, which goes to the even one.
template <class T>
constexpr float kRoundsToZero = std::is_same_v<T, Float16>    ? 0x1p-25f
                                : std::is_same_v<T, BFloat16> ? 0x1p-134f
                                                              : 0.0f;

template <class T>
class Forward {
 public:
  static constexpr int kConstants = 3;  // pivot, scale, shift
  static constexpr int64_t kRowsAtOnce = 8;

  explicit Forward(const BatchNormReluForward& args)
      : a_(args),
        x_(static_cast<const T*>(a_.x)),
        residual_(static_cast<const T*>(a_.residual)),
        y_(static_cast<T*>(a_.y)) {}

  const float* constants() const { return a_.saved; }
  static constexpr int64_t bytes() { return sizeof(T); }
  int64_t written() const { return a_.layout.numel * bytes(); }

  // The mean of a few values, spread over samples and places; 0 where one of them is infinite or NaN.
  BDFAST_ONE_COPY void begin(int64_t c) {
    const ChannelLayout& l = a_.layout;
    const int64_t samples = l.numel / (l.channels * l.inner);
    float sum = 0.0f;
    for (int64_t i = 0; i < kPivots; ++i) {
      const int64_t sample = samples * i / kPivots, place = l.inner * i / kPivots;
      sum += to_float(x_[(sample * l.channels + c) * l.inner + place]);
    }
    a_.saved[kPivot * l.channels + c] = std::isfinite(sum) ? sum / kPivots : 0.0f;
  }

  template <class Constants>
  Sums<float> terms(int64_t element, const Constants& k, int64_t column) const {
    const float d = to_float(x_[element]) - k(kPivot, column);
    return {d, d * d};
  }

  void end(int64_t c, const Sums<double>& sums) {
    const int64_t channels = a_.layout.channels;
    const double count = static_cast<double>(a_.layout.numel / channels);
    const double delta = sums.first / count, excess = sums.second / count - delta * delta;
    const double var = excess < 0.0 ? 0.0 : excess;  // by a rounding; NaN stays
    const double mean = a_.saved[kPivot * channels + c] + delta;
    const double inverse = 1.0 / std::sqrt(var + a_.eps), scale = a_.weight[c] * inverse;
    a_.mean[c] = static_cast<float>(mean);
    a_.var[c] = static_cast<float>(var);
    a_.saved[kScale * channels + c] = static_cast<float>(scale);
    a_.saved[kShift * channels + c] = static_cast<float>(a_.bias[c] - delta * scale);
    a_.saved[kInverse * channels + c] = static_cast<float>(inverse);
    a_.saved[kDelta * channels + c] = static_cast<float>(delta);
    if (a_.running_mean == nullptr) return;
    move(a_.running_mean + c, mean);
    move(a_.running_var + c, var * count / std::max(1.0, count - 1.0));
  }

  template <class Constants>
  void write(int64_t begin, int64_t count, const Constants& k, bool past) const {
    if (a_.residual != nullptr)
      a_.relu ? write_run<true, true>(begin, count, k, past) : write_run<true, false>(begin, count, k, past);
    else
      a_.relu ? write_run<false, true>(begin, count, k, past) : write_run<false, false>(begin, count, k, past);
  }

 private:
  static constexpr int64_t kPivots = 8;

  template <bool kResidual, bool kRelu, class Constants>
  void write_run(int64_t begin, int64_t count, const Constants& k, bool past) const {
    const T* x = x_ + begin;
    const T* residual = residual_ + (kResidual ? begin : 0);
    store_run(y_ + begin, count, past, [=](int64_t i) {
      float value = affine(to_float(x[i]) - k(kPivot, i), k(kScale, i), k(kShift, i));
      if (kResidual) value += to_float(residual[i]);
      if (kRelu) value = value <= 0.0f ? 0.0f : value;  // keeps NaN
      return value;
    });
  }

  void move(float* running, double target) const {
    *running = static_cast<float>(*running + a_.momentum * (target - *running));
  }

  const BatchNormReluForward& a_;
  const T* x_;
  const T* residual_;
  T* y_;
};

template <class T, Mask kMask>
class Backward {
 public:
  static constexpr int kConstants = 5;  // pivot, scale, shift, slope, offset
  // With a store in each, the compiler makes no vectors of eight rows in bfloat16.
  static constexpr int64_t kRowsAtOnce = kMask == Mask::from_y ? 4 : 8;

  explicit Backward(const BatchNormReluBackward& args)
      : a_(args),
        grad_(static_cast<const T*>(a_.grad)),
        x_(static_cast<const T*>(a_.x)),
        y_(static_cast<const T*>(a_.y)),
        masked_(static_cast<T*>(a_.masked)),
        grad_x_(static_cast<T*>(a_.grad_x)),
        constants_(a_.saved, a_.saved + 3 * a_.layout.channels) {
    constants_.resize(static_cast<size_t>(kConstants * a_.layout.channels));
  }

  const float* constants() const { return constants_.data(); }
  static constexpr int64_t bytes() { return 2 * sizeof(T); }
  int64_t written() const { return a_.layout.numel * static_cast<int64_t>(sizeof(T)); }
  void begin(int64_t) {}

  template <class Constants>
  Sums<float> terms(int64_t element, const Constants& k, int64_t column) const {
    const float d = to_float(x_[element]) - k(kPivot, column);
    float g = to_float(grad_[element]);
    if (kMask == Mask::from_y) {
      g = to_float(y_[element]) <= 0.0f ? 0.0f : g;  // NaN keeps its gradient
      store(masked_ + element, g);
    }
    if (kMask == Mask::from_x) g = where_positive(g, d, k, column);
    return {g, g * d};
  }

  void end(int64_t c, const Sums<double>& sums) {
    const int64_t channels = a_.layout.channels;
    const double count = static_cast<double>(a_.layout.numel / channels);
    const double inverse = a_.saved[kInverse * channels + c], delta = a_.saved[kDelta * channels + c];
    const double grad_weight = inverse * (sums.second - delta * sums.first);
    const double slope = -inverse * grad_weight / count;
    a_.grad_weight[c] = static_cast<float>(grad_weight);
    a_.grad_bias[c] = static_cast<float>(sums.first);
    constants_[kSlope * channels + c] = static_cast<float>(slope);
    constants_[kOffset * channels + c] = static_cast<float>(-sums.first / count - slope * delta);
  }

  template <class Constants>
  void write(int64_t begin, int64_t count, const Constants& k, bool past) const {
    const T* x = x_ + begin;
    const T* grad = (kMask == Mask::from_y ? masked_ : grad_) + begin;
    store_run(grad_x_ + begin, count, past, [=](int64_t i) {
      const float d = to_float(x[i]) - k(kPivot, i);
      float g = to_float(grad[i]);
      if (kMask == Mask::from_x) g = where_positive(g, d, k, i);
      // The scale comes last: of one value a channel, g less its mean is 0 and stays 0.
      return k(kScale, i) * (g + affine(d, k(kSlope, i), k(kOffset, i)));
    });
  }

 private:
  enum { kSlope = 3, kOffset = 4 };

  template <class Constants>
  static float where_positive(float g, float d, const Constants& k, int64_t column) {
    return affine(d, k(kScale, column), k(kShift, column)) <= kRoundsToZero<T> ? 0.0f : g;
  }

  const BatchNormReluBackward& a_;
  const T* grad_;
  const T* x_;
  const T* y_;
  T* masked_;
  T* grad_x_;
  std::vector<float> constants_;  // [5, channels]
};

template <class T>
void forward(const BatchNormReluForward& a) {
  prefer_huge_pages(a.y, a.layout.numel * static_cast<int64_t>(sizeof(T)));
  two_passes(a.layout, Forward<T>(a));
}

template <class T>
void backward(const BatchNormReluBackward& a) {
  const int64_t bytes = a.layout.numel * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(a.grad_x, bytes);
  if (!a.relu) return two_passes(a.layout, Backward<T, Mask::none>(a));
  if (a.y == nullptr) return two_passes(a.layout, Backward<T, Mask::from_x>(a));
  prefer_huge_pages(a.masked, bytes);
  two_passes(a.layout, Backward<T, Mask::from_y>(a));
}

}  // namespace

void batch_norm_relu_fwd(const BatchNormReluForward& args) {
  switch (args.dtype) {
    case DType::float16:
      return forward<Float16>(args);
    case DType::bfloat16:
      return forward<BFloat16>(args);
    default:
      return forward<float>(args);
  }
}

void batch_norm_relu_bwd(const BatchNormReluBackward& args) {
  switch (args.dtype) {
    case DType::float16:
      return backward<Float16>(args);
    case DType::bfloat16:
      return backward<BFloat16>(args);
    default:
      return backward<float>(args);
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
