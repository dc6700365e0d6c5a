// Transcendental functions of the row kernels, written to vectorise.
#pragma once

#include "dtype.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// exp(x) for x <= 0, as softmax needs it after the maximum is subtracted. Relative error below 2 ulp (2.0e-7), exact at
// 0; 0 where the result would lie under the smallest normal float, or a subnormal within one bit of it; NaN stays NaN.
//
// exp(x) = 2^n * exp(r) with n = round(x / ln 2), |r| <= ln(2) / 2, and exp(r) = 1 + r + r^2 (...) by the polynomial of
// degree 5 whose largest relative error there is the least, 1.05e-7.
inline float exp_nonpositive(float x) {
  constexpr float log2_e = 1.44269504088896341f;
  constexpr float ln2_high = 0.693359375f;  // 12 bits: n * ln2_high is exact
  constexpr float ln2_low = -2.12194440e-4f;
  // 1.5 * 2^23 + 127: adding it leaves round(x) + 127, the exponent bits of 2^n, in the low bits of the mantissa.
  constexpr float round_and_bias = 12583039.0f;
  constexpr float least = -88.0f;  // n = -127 there, whose exponent bits are those of 0
  const float bounded = x < least ? least : x;
  const float shifted = bounded * log2_e + round_and_bias;
  const float n = shifted - round_and_bias;
  const float r = (bounded - n * ln2_high) - n * ln2_low;
  float p = 0.00831252f;
  p = p * r + 0.04189016f;
  p = p * r + 0.16667115f;
  p = p * r + 0.49999231f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_to_float(float_to_bits(shifted) << 23);
}

// log(x) for positive, normal, finite x, such as a sum of exponentials whose largest term is 1. Relative error below
// 2 ulp; NaN stays NaN.
//
// x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and log(1 + f) = 2 atanh(t), t = f / (2 + f), |t| < 0.172, by
// its series to t^9, whose remainder (2 t^11 / 11 < 8e-10) lies below half a float32 ulp of t.
inline float log_positive(float x) {
  constexpr uint32_t sqrt_half = 0x3f3504f3u;
  constexpr float ln2_high = 0.693359375f;
  constexpr float ln2_low = -2.12194440e-4f;
  const uint32_t bits = float_to_bits(x);
  const int32_t e = static_cast<int32_t>(bits - sqrt_half) >> 23;
  const float f = bits_to_float(bits - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  const float t = f / (2.0f + f);
  const float t2 = t * t;
  float p = 2.0f / 9.0f;
  p = p * t2 + 2.0f / 7.0f;
  p = p * t2 + 2.0f / 5.0f;
  p = p * t2 + 2.0f / 3.0f;
  p = p * t2 * t + 2.0f * t;
  const float exponent = static_cast<float>(e);
  return (p + exponent * ln2_low) + exponent * ln2_high + (x - x);  // x - x: NaN stays NaN
}

// log(1 + e) for e in [0, 1], to 2 ulp however small e is. NaN stays NaN.
//
// log(1 + e) = 2 atanh(t), t = e / (2 + e) <= 1/3, by its series to t^13, whose remainder (t^14 / 15 < 2e-8 of the
// result) lies below a float32 ulp.
inline float log1p_unit(float e) {
  const float t = e / (2.0f + e);
  const float t2 = t * t;
  float p = 2.0f / 13.0f;
  p = p * t2 + 2.0f / 11.0f;
  p = p * t2 + 2.0f / 9.0f;
  p = p * t2 + 2.0f / 7.0f;
  p = p * t2 + 2.0f / 5.0f;
  p = p * t2 + 2.0f / 3.0f;
  p = p * t2 + 2.0f;
  return p * t;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
