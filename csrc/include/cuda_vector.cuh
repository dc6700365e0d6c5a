// Elements of any type, one at a time or 16 bytes at a time.
#pragma once

#include <cstring>

#include "cuda_launch.h"
#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

template <class T, int kVector>
struct Values {
  T value[kVector];
};

// With kVector > 1, `p` is a multiple of 16 bytes.
template <class T, int kVector>
__device__ __forceinline__ Values<T, kVector> load_values(const T* p) {
  Values<T, kVector> values;
  if constexpr (kVector == 1) {
    values.value[0] = *p;
  } else {
    static_assert(sizeof(values) == sizeof(float4), "one access");
    const float4 bits = *reinterpret_cast<const float4*>(p);
    memcpy(&values, &bits, sizeof bits);
  }
  return values;
}

template <class T, int kVector>
__device__ __forceinline__ void store_values(T* p, const Values<T, kVector>& values) {
  if constexpr (kVector == 1) {
    *p = values.value[0];
  } else {
    float4 bits;
    memcpy(&bits, &values, sizeof bits);
    *reinterpret_cast<float4*>(p) = bits;
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
