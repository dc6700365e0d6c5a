// Transcendental functions of the row kernels, written to vectorise.
#pragma once

#include "dtype.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// exp(x) for x <= 0, as softmax needs it after the maximum is subtracted. Relative error below 2 ulp; results under
// the smallest normal float are flushed to 0; NaN stays NaN.
//
// exp(x) = 2^n * exp(r) with n = round(x / ln 2), |r| <= ln(2) / 2, and exp(r) by its Taylor series to degree 7, whose
// remainder there (r^8 / 8! < 6e-9) lies below half a float32 ulp.
inline float exp_nonpositive(float x) {
  constexpr float log2_e = 1.44269504088896341f;
  constexpr float ln2_high = 0.693359375f;  // 12 bits: n * ln2_high is exact
  constexpr float ln2_low = -2.12194440e-4f;
  constexpr float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  constexpr float smallest = -87.3365448f;     // log of the smallest normal float
  const float clamped = x < smallest ? smallest : x;
  const float shifted = clamped * log2_e + round_to_int;
  const float n = shifted - round_to_int;
  const float r = (clamped - n * ln2_high) - n * ln2_low;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scale = bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
  const float value = p * scale;
  return x < smallest ? 0.0f : value;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
