// Walks over arrays of float four at a time: 16-byte accesses where the arrays allow them, the same arithmetic in the
// same order where they do not.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda_launch.h"
#include "isa.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

struct Quad {
  float value[4];
};

enum class Cache {
  keep,    // will be wanted again soon
  stream,  // the last use for a while: evicted first
  global,  // past the L1 cache, which does not see what other multiprocessors write
};

template <Cache kCache, class T>
__device__ __forceinline__ T read(const T* p) {
  if constexpr (kCache == Cache::stream) return __ldcs(p);
  if constexpr (kCache == Cache::global) return __ldcg(p);
  return *p;
}

template <Cache kCache, class T>
__device__ __forceinline__ void write(T* p, T value) {
  if constexpr (kCache == Cache::stream) {
    __stcs(p, value);
  } else {
    *p = value;
  }
}

// A part of an array of `numel` floats: every `stride`-th quad from `first` on.
struct Quads {
  int64_t numel;
  int64_t first;
  int64_t stride;
  bool aligned;  // every array of the walk starts at a multiple of 16 bytes
};

// Quad number `quad`; zeros past the end. kWhole: all of it is inside, at a multiple of 16 bytes.
template <bool kWhole, Cache kCache = Cache::keep>
__device__ __forceinline__ Quad load(const float* p, int64_t quad, int64_t numel) {
  if constexpr (kWhole) {
    const float4 loaded = read<kCache>(reinterpret_cast<const float4*>(p) + quad);
    return {{loaded.x, loaded.y, loaded.z, loaded.w}};
  } else {
    Quad loaded = {{0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i < numel) loaded.value[i] = read<kCache>(p + 4 * quad + i);
    }
    return loaded;
  }
}

template <bool kWhole, Cache kCache = Cache::keep>
__device__ __forceinline__ void store(float* p, int64_t quad, int64_t numel, const Quad& stored) {
  if constexpr (kWhole) {
    const float4 values = {stored.value[0], stored.value[1], stored.value[2], stored.value[3]};
    write<kCache>(reinterpret_cast<float4*>(p) + quad, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i < numel) write<kCache>(p + 4 * quad + i, stored.value[i]);
    }
  }
}

// For each quad: use(quad, fetch(quad, whole), whole), where `whole` is std::true_type or std::false_type. kUnroll fetches
// come before the first use, so that all their loads are in flight together.
template <int kUnroll, class Fetch, class Use>
__device__ __forceinline__ void for_each_quad(const Quads& quads, const Fetch& fetch, const Use& use) {
  const int64_t count = (quads.numel + 3) / 4;
  const int64_t whole = quads.aligned ? quads.numel / 4 : 0;
  int64_t quad = quads.first;
  for (; quad + (kUnroll - 1) * quads.stride < whole; quad += kUnroll * quads.stride) {
    decltype(fetch(quad, std::true_type{})) fetched[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) fetched[u] = fetch(quad + u * quads.stride, std::true_type{});
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) use(quad + u * quads.stride, fetched[u], std::true_type{});
  }
  for (; quad < count; quad += quads.stride) {
    if (quad < whole) {
      use(quad, fetch(quad, std::true_type{}), std::true_type{});
    } else {
      use(quad, fetch(quad, std::false_type{}), std::false_type{});
    }
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
