// Element types of the row kernels, and their exact conversion to and from float32.
//
// The conversions are branch-free integer arithmetic so that the compiler vectorises them on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace bdfast {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

namespace BDFAST_ISA_NAMESPACE {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

BDFAST_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

BDFAST_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

BDFAST_HOST_DEVICE float to_float(float value) { return value; }

BDFAST_HOST_DEVICE float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

BDFAST_HOST_DEVICE float to_float(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Moving the fraction into place leaves the exponent short by 127 - 15; a product with 2^112 mends it for normal and
  // subnormal halves alike.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float((112u + 127u) << 23);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN keep an all-ones exponent
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  return bits_to_float(float_to_bits(scaled) | special | sign);
}

BDFAST_HOST_DEVICE void store(float* target, float value) { *target = value; }

BDFAST_HOST_DEVICE void store(BFloat16* target, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  target->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

BDFAST_HOST_DEVICE void store(Float16* target, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent and round the 13 dropped bits to nearest even; a carry may reach infinity.
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 lets the floating-point unit round at 2^-24, the spacing of subnormal halves.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? overflow : half;
  target->bits = static_cast<uint16_t>(half | sign);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
