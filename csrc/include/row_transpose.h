// Narrow rows of a matrix to vectors of one class each, and back.
//
// A register of 4, 8 or 16 floats is seen as quads: four classes of one row each. Four registers that hold rows
// (0, 4, ..), (1, 5, ..), (2, 6, ..) and (3, 7, ..), transposed within their quads, are four classes of all the rows in
// order: per row and four classes that is 1 load, 8 shuffles a register's rows, and a store.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "dtype.h"
#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

#ifdef __SSE2__

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own AVX-512 header: an operand that is not used
#endif

// `load` and `store` move quads of rows `stride` elements apart; `load_lanes` and `store_lanes` a whole register.
struct Quads4 {
  using Register = __m128;
  static constexpr int64_t rows = 4;
  static Register load(const float* row, int64_t) { return _mm_loadu_ps(row); }
  static void store(float* row, int64_t, Register r) { _mm_storeu_ps(row, r); }
  static Register load_lanes(const float* lanes) { return _mm_loadu_ps(lanes); }
  static void store_lanes(float* lanes, Register r) { _mm_storeu_ps(lanes, r); }
  static Register low(Register a, Register b) { return _mm_unpacklo_ps(a, b); }
  static Register high(Register a, Register b) { return _mm_unpackhi_ps(a, b); }
  static Register low_pairs(Register a, Register b) { return _mm_movelh_ps(a, b); }
  static Register high_pairs(Register a, Register b) { return _mm_movehl_ps(b, a); }
};

#ifdef __AVX2__
struct Quads8 {
  using Register = __m256;
  static constexpr int64_t rows = 8;
  static Register load(const float* row, int64_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * stride), 1);
  }
  static void store(float* row, int64_t stride, Register r) {
    _mm_storeu_ps(row, _mm256_castps256_ps128(r));
    _mm_storeu_ps(row + 4 * stride, _mm256_extractf128_ps(r, 1));
  }
  static Register load_lanes(const float* lanes) { return _mm256_loadu_ps(lanes); }
  static void store_lanes(float* lanes, Register r) { _mm256_storeu_ps(lanes, r); }
  static Register low(Register a, Register b) { return _mm256_unpacklo_ps(a, b); }
  static Register high(Register a, Register b) { return _mm256_unpackhi_ps(a, b); }
  static Register low_pairs(Register a, Register b) { return _mm256_shuffle_ps(a, b, 0x44); }
  static Register high_pairs(Register a, Register b) { return _mm256_shuffle_ps(a, b, 0xee); }
};
#endif

#ifdef __AVX512F__
struct Quads16 {
  using Register = __m512;
  static constexpr int64_t rows = 16;
  static Register load(const float* row, int64_t stride) {
    Register r = _mm512_castps128_ps512(_mm_loadu_ps(row));
    r = _mm512_mask_broadcast_f32x4(r, 0x00f0, _mm_loadu_ps(row + 4 * stride));
    r = _mm512_mask_broadcast_f32x4(r, 0x0f00, _mm_loadu_ps(row + 8 * stride));
    return _mm512_mask_broadcast_f32x4(r, 0xf000, _mm_loadu_ps(row + 12 * stride));
  }
  static void store(float* row, int64_t stride, Register r) {
    _mm_storeu_ps(row, _mm512_castps512_ps128(r));
    _mm_storeu_ps(row + 4 * stride, _mm512_extractf32x4_ps(r, 1));
    _mm_storeu_ps(row + 8 * stride, _mm512_extractf32x4_ps(r, 2));
    _mm_storeu_ps(row + 12 * stride, _mm512_extractf32x4_ps(r, 3));
  }
  static Register load_lanes(const float* lanes) { return _mm512_loadu_ps(lanes); }
  static void store_lanes(float* lanes, Register r) { _mm512_storeu_ps(lanes, r); }
  static Register low(Register a, Register b) { return _mm512_unpacklo_ps(a, b); }
  static Register high(Register a, Register b) { return _mm512_unpackhi_ps(a, b); }
  static Register low_pairs(Register a, Register b) { return _mm512_shuffle_ps(a, b, 0x44); }
  static Register high_pairs(Register a, Register b) { return _mm512_shuffle_ps(a, b, 0xee); }
};
#endif

#ifdef __AVX512F__

// Sixteen rows side by side of 2 kOdd classes, seen as pairs of classes. Eight rows are kOdd registers of eight pairs; in
// lane l of register k lies a pair P = 8 k + l (mod kOdd) of some row. With the registers in the order that makes this
// P = k + l, lane l of what is to hold pair P comes from register P - l: the registers are rotated by a number that a lane
// knows, one bit of it at a time. That leaves every pair in a register of its own, its rows in the order (kOdd r + P) mod 8.
template <int64_t kOdd>
struct OddPairs {
  static constexpr int64_t row = 2 * kOdd, rows = 16;

  // Where class j of row i lies in the registers of its pair, those of eight rows and of the next eight.
  struct Places {
    alignas(64) int32_t of[row][rows];
    constexpr Places() : of{} {
      for (int64_t j = 0; j < row; ++j) {
        for (int64_t i = 0; i < rows; ++i)
          of[j][i] = static_cast<int32_t>(i / 8 * 16 + (kOdd * (i % 8) + j / 2) % 8 * 2 + j % 2);
      }
    }
  };
  static constexpr Places places{};

  static constexpr int64_t register_of(int64_t place) {
    int64_t k = 0;
    while (8 * k % kOdd != place) ++k;
    return k;
  }
  static constexpr __mmask8 lanes_with(int64_t bit) {
    unsigned lanes = 0;
    for (int64_t lane = 0; lane < 8; ++lane) lanes |= (lane % kOdd & bit) != 0 ? 1u << lane : 0u;
    return static_cast<__mmask8>(lanes);
  }

  static inline void load(const float* eight_rows, __m512d (&pairs)[kOdd]) {
#pragma GCC unroll 16
    for (int64_t p = 0; p < kOdd; ++p) pairs[p] = _mm512_castps_pd(_mm512_loadu_ps(eight_rows + 16 * register_of(p)));
#pragma GCC unroll 4
    for (int64_t bit = 1; bit < kOdd; bit *= 2) {
      __m512d before[kOdd];
      std::copy(pairs, pairs + kOdd, before);
#pragma GCC unroll 16
      for (int64_t p = 0; p < kOdd; ++p)
        pairs[p] = _mm512_mask_mov_pd(before[p], lanes_with(bit), before[(p + kOdd - bit) % kOdd]);
    }
  }
};

// As load_quads, for rows of 2 kOdd classes side by side: 30 blends and 10 shuffles for 16 rows of 10 classes, of which
// 36 of the 48 loads of quads are shuffles, too.
template <int64_t kOdd, int64_t kGroup>
int64_t load_pairs(const float* rows, int64_t lane, int64_t count, float* block) {
  using Pairs = OddPairs<kOdd>;
  for (; lane + Pairs::rows <= count; lane += Pairs::rows) {
    __m512d low[kOdd], high[kOdd];
    Pairs::load(rows + lane * Pairs::row, low);
    Pairs::load(rows + (lane + Pairs::rows / 2) * Pairs::row, high);
#pragma GCC unroll 32
    for (int64_t j = 0; j < Pairs::row; ++j) {
      const __m512i places = _mm512_load_si512(Pairs::places.of[j]);
      _mm512_storeu_ps(block + j * kGroup + lane,
                       _mm512_permutex2var_ps(_mm512_castpd_ps(low[j / 2]), places, _mm512_castpd_ps(high[j / 2])));
    }
  }
  return lane;
}

#endif

#if defined(__AVX512F__)
using WideQuads = Quads16;
#elif defined(__AVX2__)
using WideQuads = Quads8;
#else
using WideQuads = Quads4;
#endif

// Transposes every 4 x 4 that a quad of each register makes up.
template <class Q>
inline void transpose_quads(typename Q::Register (&r)[4]) {
  const auto low_01 = Q::low(r[0], r[1]), low_23 = Q::low(r[2], r[3]);
  const auto high_01 = Q::high(r[0], r[1]), high_23 = Q::high(r[2], r[3]);
  r[0] = Q::low_pairs(low_01, low_23);
  r[1] = Q::high_pairs(low_01, low_23);
  r[2] = Q::low_pairs(high_01, high_23);
  r[3] = Q::high_pairs(high_01, high_23);
}

// Whole registers of rows from `lane` on, of at least four classes: the last four classes overlap those before them
// where C is not a multiple of 4. Return the first row that is left.
template <class Q, int64_t kGroup>
int64_t load_quads(const float* rows, int64_t stride, int64_t classes, int64_t lane, int64_t count, float* block) {
  for (; lane + Q::rows <= count; lane += Q::rows) {
    for (int64_t next = 0; next < classes; next += 4) {
      const int64_t j = std::min(next, classes - 4);
      const float* corner = rows + lane * stride + j;
      typename Q::Register r[4] = {Q::load(corner, stride), Q::load(corner + stride, stride),
                                   Q::load(corner + 2 * stride, stride), Q::load(corner + 3 * stride, stride)};
      transpose_quads<Q>(r);
      for (int64_t k = 0; k < 4; ++k) Q::store_lanes(block + (j + k) * kGroup + lane, r[k]);
    }
  }
  return lane;
}

template <class Q, int64_t kGroup>
int64_t store_quads(const float* block, int64_t classes, int64_t lane, int64_t count, float* rows) {
  for (; lane + Q::rows <= count; lane += Q::rows) {
    for (int64_t next = 0; next < classes; next += 4) {
      const int64_t j = std::min(next, classes - 4);
      const float* corner = block + j * kGroup + lane;
      typename Q::Register r[4] = {Q::load_lanes(corner), Q::load_lanes(corner + kGroup),
                                   Q::load_lanes(corner + 2 * kGroup), Q::load_lanes(corner + 3 * kGroup)};
      transpose_quads<Q>(r);
      for (int64_t k = 0; k < 4; ++k) Q::store(rows + (lane + k) * classes + j, classes, r[k]);
    }
  }
  return lane;
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif

// block[j][lane] = rows[lane][j] of `count` <= kGroup rows, in float32; further lanes are 0. One pass of moves costs less
// than a strided gather in each of the passes that follow.
template <int64_t kGroup, class T>
void load_transposed(const T* rows, int64_t stride, int64_t classes, int64_t count, float* block) {
  int64_t lane = 0;
#ifdef __SSE2__
  if constexpr (std::is_same_v<T, float>) {
#ifdef __AVX512F__
    if (classes == 10 && stride == 10) lane = load_pairs<5, kGroup>(rows, lane, count, block);
#endif
    if (classes >= 4) {
      lane = load_quads<WideQuads, kGroup>(rows, stride, classes, lane, count, block);
      lane = load_quads<Quads4, kGroup>(rows, stride, classes, lane, count, block);
    }
  }
#endif
  if (lane == kGroup) return;
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t i = lane; i < count; ++i) block[j * kGroup + i] = to_float(rows[i * stride + j]);
    for (int64_t i = count; i < kGroup; ++i) block[j * kGroup + i] = 0.0f;
  }
}

// rows[lane][j] = block[j][lane] for `count` <= kGroup rows side by side, `classes` long.
template <int64_t kGroup, class T>
void store_transposed(const float* block, int64_t classes, int64_t count, T* rows) {
  int64_t lane = 0;
#ifdef __SSE2__
  if constexpr (std::is_same_v<T, float>) {
    if (classes >= 4) {
      lane = store_quads<WideQuads, kGroup>(block, classes, lane, count, rows);
      lane = store_quads<Quads4, kGroup>(block, classes, lane, count, rows);
    }
  }
#endif
  for (; lane < count; ++lane) {
    for (int64_t j = 0; j < classes; ++j) store(rows + lane * classes + j, block[j * kGroup + lane]);
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
