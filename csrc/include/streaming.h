// Outputs that are too large to be found in a cache again.
//
// A store through the caches first fetches the line that it is about to fill, so that a write costs a read as well. A
// streaming store goes past the caches. It pays where nobody reads the output before it has left them, and where what it
// is made from comes from a cache: batch_norm_relu on planes, 34 MB, took 0.8 of the time with it, but in channels_last,
// reading from memory, 1.1 times as long.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "dtype.h"
#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

// Below this an output is read from a cache by what comes next.
constexpr int64_t kStreamedBytes = 32 * 1024 * 1024;

// Copies into whole lines of `to` past the caches, and into what is left at both ends through them.
inline void stream([[maybe_unused]] char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  const int64_t head = std::min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & (kLine - 1)));
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine)
    for (int64_t part = 0; part < kLine; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + part)));
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// Stores are seen by other threads in order again after this.
inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// to[i] = value(i), rounded to T; `past` the caches or not. end_streaming() is the caller's.
template <class T, class Value>
void store_run(T* to, int64_t count, bool past, const Value& value) {
  if (!past) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(to + i, value(i));
    return;
  }
  constexpr int64_t kBuffer = 1024;
  T buffer[kBuffer];
  for (int64_t begin = 0; begin < count; begin += kBuffer) {
    const int64_t part = std::min(kBuffer, count - begin);
#pragma omp simd
    for (int64_t i = 0; i < part; ++i) store(buffer + i, value(begin + i));
    stream(reinterpret_cast<char*>(to + begin), reinterpret_cast<const char*>(buffer),
           part * static_cast<int64_t>(sizeof(T)));
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
