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
constexpr int64_t kVector = 16;
#elif defined(__AVX2__)
constexpr int64_t kVector = 8;
#else
constexpr int64_t kVector = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kVector)));
typedef uint32_t VectorBits __attribute__((vector_size(4 * kVector)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kVector)));

inline Vector load_vector(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store_vector(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

inline Vector load_vector(const BFloat16* from) {
  HalfBits half;
  std::memcpy(&half, from, sizeof half);
  const VectorBits bits = __builtin_convertvector(half, VectorBits) << 16;
  Vector value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded as `store` of dtype.h has it.
inline void store_vector(BFloat16* to, Vector value) {
  VectorBits bits;
  std::memcpy(&bits, &value, sizeof bits);
  const VectorBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VectorBits nan = (VectorBits)((bits & 0x7fffffffu) > 0x7f800000u);  // all ones where it is
  const HalfBits half = __builtin_convertvector((nan & ((bits >> 16) | 0x40u)) | (~nan & rounded), HalfBits);
  std::memcpy(to, &half, sizeof half);
}

// `value`, but 0 where `of` <= 0; where that is NaN, the value stays.
inline Vector mask_vector(Vector value, Vector of) {
  VectorBits bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= ~(VectorBits)(of <= 0.0f);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#else

constexpr int64_t kVector = 1;
using Vector = float;
template <class T>
inline Vector load_vector(const T* from) {
  return to_float(*from);
}
template <class T>
inline void store_vector(T* to, Vector value) {
  store(to, value);
}
inline Vector mask_vector(Vector value, Vector of) { return of <= 0.0f ? 0.0f : value; }

#endif

// max(value, 0); NaN stays NaN.
inline Vector relu_vector(Vector value) { return mask_vector(value, value); }

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
