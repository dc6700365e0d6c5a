// As many floats as a register holds, as one value: 16 with AVX-512, 8 with AVX2, 4 elsewhere, 1 for compilers without
// vector extensions. Arithmetic on them is that of the floats, lane by lane; a * b + c is rounded once where the
// instruction set has such an instruction.
//
// For kernels that keep many sums in registers, where what a compiler makes of a loop over floats is not enough. Row
// kernels use pack.h, whose loops are the compiler's outside AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

#if defined(__GNUC__)

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t LaneBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));

inline Lanes load_lanes(const float* from) {
  Lanes value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store_lanes(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }

inline Lanes load_lanes(const BFloat16* from) {
  HalfBits half;
  std::memcpy(&half, from, sizeof half);
  const LaneBits bits = __builtin_convertvector(half, LaneBits) << 16;
  Lanes value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded as `store` of dtype.h has it.
inline void store_lanes(BFloat16* to, Lanes value) {
  LaneBits bits;
  std::memcpy(&bits, &value, sizeof bits);
  const LaneBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const LaneBits nan = (LaneBits)((bits & 0x7fffffffu) > 0x7f800000u);  // all ones where it is
  const HalfBits half = __builtin_convertvector((nan & ((bits >> 16) | 0x40u)) | (~nan & rounded), HalfBits);
  std::memcpy(to, &half, sizeof half);
}

// `value`, but 0 where `of` <= 0; where that is NaN, the value stays.
inline Lanes mask_lanes(Lanes value, Lanes of) {
  LaneBits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= ~(LaneBits)(of <= 0.0f);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#else

constexpr int64_t kLanes = 1;
using Lanes = float;
template <class T>
inline Lanes load_lanes(const T* from) {
  return to_float(*from);
}
template <class T>
inline void store_lanes(T* to, Lanes value) {
  store(to, value);
}
inline Lanes mask_lanes(Lanes value, Lanes of) { return of <= 0.0f ? 0.0f : value; }

#endif

// max(value, 0); NaN stays NaN.
inline Lanes relu_lanes(Lanes value) { return mask_lanes(value, value); }

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
