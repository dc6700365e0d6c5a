// A few floats that are computed together: 16 with AVX-512, else one, which loops under `omp simd` leave to the compiler.
//
// Loops over packs are written once. With AVX-512 they hold what a compiler does not find: exp by a table of 32 powers of
// two in two registers, with 6 products where the polynomial of `exp_nonpositive` takes 10, and sums that stay in
// registers. A row of 1,000 took 147 ns instead of 206 for its exponentials and their sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "dtype.h"
#include "row_math.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Before a loop over the packs of a few dozen floats.
#ifdef __AVX512F__
#define BDFAST_PACKS _Pragma("GCC unroll 4")
#else
#define BDFAST_PACKS _Pragma("omp simd")
#endif

#ifdef __AVX512F__

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC's own AVX-512 header: operands that are not used
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Fetches kCount elements that are read later; they need not exist.
template <int64_t kCount, class T>
inline void prefetch(const T* from) {
  for (int64_t i = 0; i < kCount; i += 64 / static_cast<int64_t>(sizeof(T)))  // a cache line
    _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

struct Pack {
  __m512 v;
  Pack() : v(_mm512_setzero_ps()) {}
  Pack(__m512 vector) : v(vector) {}
  Pack(float value) : v(_mm512_set1_ps(value)) {}
  Pack& operator+=(Pack b) { return *this = Pack(_mm512_add_ps(v, b.v)); }
};
constexpr int64_t kPack = 16;

inline Pack operator+(Pack a, Pack b) { return _mm512_add_ps(a.v, b.v); }
inline Pack operator-(Pack a, Pack b) { return _mm512_sub_ps(a.v, b.v); }
inline Pack operator*(Pack a, Pack b) { return _mm512_mul_ps(a.v, b.v); }
inline Pack operator/(Pack a, Pack b) { return _mm512_div_ps(a.v, b.v); }

inline Pack load_pack(const float* from) { return _mm512_loadu_ps(from); }
inline void store_pack(float* to, Pack value) { _mm512_storeu_ps(to, value.v); }

// Halves, 16 of them in half a register.
inline Pack widen(__m256i bits, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Pack widen(__m256i bits, Float16) { return _mm512_cvtph_ps(bits); }
inline __m256i narrow(Pack value, Float16) { return _mm512_cvtps_ph(value.v, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i narrow(Pack value, BFloat16) {  // as `store` has it
  const __m512i bits = _mm512_castps_si512(value.v), high = _mm512_srli_epi32(bits, 16);
  const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_epi32(high, _mm512_set1_epi32(1)));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value.v, value.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
template <class Half>
inline Pack load_pack(const Half* from) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), Half{});
}

// The first `count` of a pack, at most all of it; what is loaded beyond them is -inf.
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count < kPack ? (1u << count) - 1u : ~0u); }
inline Pack load_first(const float* from, int64_t count) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), first_lanes(count), from);
}
template <class Half>
inline Pack load_first(const Half* from, int64_t count) {
  const __mmask16 first = first_lanes(count);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), first, widen(_mm256_maskz_loadu_epi16(first, from), Half{}).v);
}
inline void store_first(float* to, int64_t count, Pack value) {
  _mm512_mask_storeu_ps(to, first_lanes(count), value.v);
}
template <class Half>
inline void store_first(Half* to, int64_t count, Pack value) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), narrow(value, Half{}));
}

// body(j, n) for packs [j, j + n) of [0, count).
template <class Body>
inline void for_packs(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + kPack <= count; j += kPack) body(j, kPack);
  if (j < count) body(j, count - j);
}

// As std::max: `a` where either is NaN.
inline Pack max(Pack a, Pack b) { return _mm512_max_ps(b.v, a.v); }

// `x` where a < b, else `y`.
inline Pack where_less(Pack a, Pack b, Pack x, Pack y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}

inline float largest(Pack a) { return _mm512_reduce_max_ps(a.v); }
inline float sum(Pack a) { return _mm512_reduce_add_ps(a.v); }

// 2^(k / 32) as float32 bits, less k << 18.
alignas(64) constexpr uint32_t kExpTable[32] = {
    0x3f800000u, 0x3f7ecd87u, 0x3f7daac3u, 0x3f7c980fu, 0x3f7b95c2u, 0x3f7aa43au, 0x3f79c3d3u, 0x3f78f4f0u,
    0x3f7837f0u, 0x3f778d3au, 0x3f76f532u, 0x3f767043u, 0x3f75fed7u, 0x3f75a15bu, 0x3f75583fu, 0x3f7523f6u,
    0x3f7504f3u, 0x3f74fbafu, 0x3f7508a4u, 0x3f752c4du, 0x3f75672au, 0x3f75b9beu, 0x3f76248cu, 0x3f76a81eu,
    0x3f7744fdu, 0x3f77fbb8u, 0x3f78ccdfu, 0x3f79b907u, 0x3f7ac0c7u, 0x3f7be4bau, 0x3f7d257du, 0x3f7e83b3u};

// exp_nonpositive, by another way: exp(x) = 2^(n / 32) * (1 + q r) with n = round(32 x / ln 2), |r| <= ln(2) / 64, and q
// the line for which the largest relative error of 1 + q r is the least, 5.3e-8. Relative error below 1.7e-7, exact at 0;
// 0 where the result would lie under the smallest normal float; NaN stays NaN.
inline Pack exp_nonpositive(Pack x) {
  const __m512 round = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it leaves n in the low bits of the mantissa
  const __m512 shifted = _mm512_fmadd_ps(x.v, _mm512_set1_ps(46.1662413f), round);
  const __m512 n = _mm512_sub_ps(shifted, round);
  const __m512 high = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f / 32), x.v);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f / 32), high);
  // 2^(n / 32): the table has the fraction of n / 32, whose bits are added with the whole part and taken off again.
  const __m512i bits = _mm512_castps_si512(shifted);
  const __m512i fraction =
      _mm512_permutex2var_epi32(_mm512_load_si512(kExpTable), bits, _mm512_load_si512(kExpTable + 16));
  const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_slli_epi32(bits, 18)));
  const __m512 q = _mm512_fmadd_ps(r, _mm512_set1_ps(0.500002444f), _mm512_set1_ps(1.00001466f));
  const __mmask16 normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);  // NaN is one of them
  return _mm512_maskz_fmadd_ps(normal, _mm512_mul_ps(q, r), power, power);
}

// The same of one number: a gradient has the same bits whether its row was computed with others or alone.
inline float exp_alone(float x) { return _mm512_cvtss_f32(exp_nonpositive(Pack(x)).v); }

// log_positive, step by step.
inline Pack log_positive(Pack x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  const Pack f = Pack(_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)))) - 1.0f;
  const Pack t = f / (f + 2.0f), t2 = t * t;
  Pack p = t2 * (2.0f / 9.0f) + 2.0f / 7.0f;
  p = p * t2 + 2.0f / 5.0f;
  p = p * t2 + 2.0f / 3.0f;
  p = p * t2 * t + t * 2.0f;
  const Pack exponent = _mm512_cvtepi32_ps(e);
  return (p + exponent * -2.12194440e-4f) + exponent * 0.693359375f + (x - x);
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

template <int64_t kCount>
inline float sum_packs(const Pack* packs) {
  Pack total = packs[0];
  for (int64_t k = 1; k < kCount / kPack; ++k) total += packs[k];
  return sum(total);
}

#else

using Pack = float;
constexpr int64_t kPack = 1;

template <class T>
inline float load_pack(const T* from) {
  return to_float(*from);
}
inline void store_pack(float* to, float value) { *to = value; }
template <class T>
inline float load_first(const T* from, int64_t) {
  return to_float(*from);
}
template <class T>
inline void store_first(T* to, int64_t, float value) {
  store(to, value);
}
template <class Body>
inline void for_packs(int64_t count, const Body& body) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) body(j, 1);
}
template <int64_t kCount, class T>
inline void prefetch(const T*) {}
inline float exp_alone(float x) { return exp_nonpositive(x); }
inline float max(float a, float b) { return std::max(a, b); }
template <int64_t kCount>
inline float sum_packs(const float* values) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < kCount; ++i) sum += values[i];
  return sum;
}
inline float where_less(float a, float b, float x, float y) { return a < b ? x : y; }

#endif

template <int64_t kCount>
inline void store_packs(const Pack* packs, float* to) {
  BDFAST_PACKS
  for (int64_t k = 0; k < kCount / kPack; ++k) store_pack(to + k * kPack, packs[k]);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
