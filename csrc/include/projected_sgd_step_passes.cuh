// projected_sgd_step_ on the GPU: what a thread does to its share of one layer, a function a pass over memory.
#pragma once

#include <cstdint>

#include "cuda_quad.cuh"
#include "projected_sgd_step.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

constexpr int kGram = 10;  // products of 4 vectors

__device__ __forceinline__ bool is_aligned(const ProjectedSgdSegment& s) {
  return ((reinterpret_cast<uintptr_t>(s.weight) | reinterpret_cast<uintptr_t>(s.anchor) |
           reinterpret_cast<uintptr_t>(s.grad) | reinterpret_cast<uintptr_t>(s.momentum)) &
          15) == 0;
}

struct Inputs {
  Quad weight, anchor, grad, momentum;
};

template <Cache kCache, bool kWhole>
__device__ __forceinline__ Inputs load_inputs(const ProjectedSgdSegment& s, int64_t quad) {
  return {load<kWhole>(s.weight, quad, s.numel), load<kWhole, kCache>(s.anchor, quad, s.numel),
          load<kWhole, kCache>(s.grad, quad, s.numel), load<kWhole, kCache>(s.momentum, quad, s.numel)};
}

__device__ __forceinline__ double squared_difference(const Quad& a, const Quad& b) {
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double difference = static_cast<double>(a.value[i]) - static_cast<double>(b.value[i]);
    sum += difference * difference;
  }
  return sum;
}

__device__ __forceinline__ Quad scaled(const Quad& weight, double scale) {
  Quad result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.value[i] = static_cast<float>(scale * static_cast<double>(weight.value[i]));
  return result;
}

// V and W~ from the inputs, in their place.
__device__ __forceinline__ void take_step(Inputs& in, float pull, float lr, float momentum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float v = updated_momentum(in.weight.value[i], in.anchor.value[i], in.grad.value[i], in.momentum.value[i],
                                     pull, momentum);
    in.momentum.value[i] = v;
    in.weight.value[i] -= lr * v;
  }
}

__device__ __forceinline__ double measure(const ProjectedSgdSegment& s, const Quads& quads) {
  struct Pair {
    Quad weight, anchor;
  };
  double squared = 0.0;
  for_each_quad<2>(
      quads,
      [&](int64_t quad, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        return Pair{load<kWhole>(s.weight, quad, s.numel), load<kWhole>(s.anchor, quad, s.numel)};
      },
      [&](int64_t, const Pair& in, auto) { squared += squared_difference(in.weight, in.anchor); });
  return squared;
}

// The products of W, D = W - W0, G and V: WW, WD, WG, WV, DD, DG, DV, GG, GV, VV.
__device__ __forceinline__ void gram(const ProjectedSgdSegment& s, const Quads& quads, double (&sums)[kGram]) {
  for_each_quad<2>(
      quads, [&](int64_t quad, auto whole) { return load_inputs<Cache::keep, decltype(whole)::value>(s, quad); },
      [&](int64_t, const Inputs& in, auto) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const double w = in.weight.value[i];
          const double vectors[4] = {w, w - static_cast<double>(in.anchor.value[i]), in.grad.value[i],
                                     in.momentum.value[i]};
          int k = 0;
#pragma unroll
          for (int row = 0; row < 4; ++row) {
#pragma unroll
            for (int column = row; column < 4; ++column) sums[k++] += vectors[row] * vectors[column];
          }
        }
      });
}

// Writes V and W~; adds <W~,W~>, <W~,W0>, <W0,W0> to `sums`.
template <Cache kCache>
__device__ __forceinline__ void update(const ProjectedSgdSegment& s, const Quads& quads, float pull, float lr,
                                       float momentum, double (&sums)[3]) {
  for_each_quad<2>(
      quads, [&](int64_t quad, auto whole) { return load_inputs<kCache, decltype(whole)::value>(s, quad); },
      [&](int64_t quad, Inputs in, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        take_step(in, pull, lr, momentum);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const double w = in.weight.value[i], w0 = in.anchor.value[i];
          sums[0] += w * w;
          sums[1] += w * w0;
          sums[2] += w0 * w0;
        }
        store<kWhole, kCache>(s.momentum, quad, s.numel, in.momentum);
        store<kWhole>(s.weight, quad, s.numel, in.weight);
      });
}

// Writes V and scale W~; returns the squared distance where it is asked for.
__device__ __forceinline__ double update_and_project(const ProjectedSgdSegment& s, const Quads& quads, float pull,
                                                     float lr, float momentum, double scale, bool direct) {
  double squared = 0.0;
  for_each_quad<1>(  // two at a time spill on some architectures
      quads, [&](int64_t quad, auto whole) { return load_inputs<Cache::stream, decltype(whole)::value>(s, quad); },
      [&](int64_t quad, Inputs in, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        take_step(in, pull, lr, momentum);
        in.weight = scaled(in.weight, scale);
        if (direct) squared += squared_difference(in.weight, in.anchor);
        store<kWhole, Cache::stream>(s.momentum, quad, s.numel, in.momentum);
        store<kWhole>(s.weight, quad, s.numel, in.weight);
      });
  return squared;
}

// W = scale W~.
template <Cache kCache>
__device__ __forceinline__ void project(const ProjectedSgdSegment& s, const Quads& quads, double scale) {
  for_each_quad<4>(
      quads, [&](int64_t quad, auto whole) { return load<decltype(whole)::value, kCache>(s.weight, quad, s.numel); },
      [&](int64_t quad, const Quad& weight, auto whole) {
        store<decltype(whole)::value>(s.weight, quad, s.numel, scaled(weight, scale));
      });
}

// W = scale W~, and the squared distance to the anchor.
template <Cache kCache>
__device__ __forceinline__ double project_and_measure(const ProjectedSgdSegment& s, const Quads& quads, double scale) {
  struct Pair {
    Quad weight, anchor;
  };
  double squared = 0.0;
  for_each_quad<2>(
      quads,
      [&](int64_t quad, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        return Pair{load<kWhole, kCache>(s.weight, quad, s.numel), load<kWhole>(s.anchor, quad, s.numel)};
      },
      [&](int64_t quad, const Pair& in, auto whole) {
        const Quad weight = scaled(in.weight, scale);
        squared += squared_difference(weight, in.anchor);
        store<decltype(whole)::value>(s.weight, quad, s.numel, weight);
      });
  return squared;
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
