// scale_to_ball_ on the CPU.
//
// Computes   d * min(1, radius / ||d||) for every image.
// A chunk    owns an image.
// Moves      reads d, and where its norm is too large reads it again (from cache) and writes it.
// Accumulates in float64, in lanes that do not depend on the processor's vectors.
#include "scale_to_ball.h"

#include "parallel.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kLanes = 32;

// The term of a value. Its magnitude is taken in float32, where it is a mask of bits for twice as many values at once.
template <bool kOneNorm, class T>
inline double term_of(T value) {
  const float v = to_float(value);
  return norm_term(kOneNorm ? std::fabs(v) : v, kOneNorm);
}

template <bool kOneNorm, class T>
double sum_of_terms(const T* values, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term_of<kOneNorm>(values[i + lane]);
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) lanes[lane] += term_of<kOneNorm>(values[i]);
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <class T>
void scale_all(const ScaleToBallArgs& a) {
  T* const first = static_cast<T*>(a.perturbation);
  const int64_t bytes = 3 * a.images * a.numel * static_cast<int64_t>(sizeof(T));
  parallel_chunks(a.images, bytes, [&](int64_t image) {
    T* values = first + image * a.numel;
    const double terms = a.one_norm ? sum_of_terms<true>(values, a.numel) : sum_of_terms<false>(values, a.numel);
    const double scale = ball_scale(a, image, terms);
    if (scale == 1.0) return;
#pragma omp simd
    for (int64_t i = 0; i < a.numel; ++i) store(values + i, scaled(to_float(values[i]), scale));
  });
}

}  // namespace

void scale_to_ball(const ScaleToBallArgs& args) {
  switch (args.dtype) {
    case DType::float16:
      return scale_all<Float16>(args);
    case DType::bfloat16:
      return scale_all<BFloat16>(args);
    default:
      return scale_all<float>(args);
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
