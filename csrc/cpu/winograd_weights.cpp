// Weights of the 3x3 convolutions of winograd_conv.cpp: there and, their gradients, back.
//
// Computes   U = G g G^T, in the order of the products; and g' = G^T [sum over tiles (A Y' A^T) * V] G.
// A chunk    owns a panel of outputs; of the gradient: some tiles while they are transformed, then a place and a panel
//            while they are multiplied.
// Moves      the weights once, 4 times as much as they are; of the gradient: x and y' once, and U' once for some hundred
//            tiles, whose transforms stay in a cache that all threads share.
// Accumulates in float32 over tiles in order, whatever the number of threads.
#include <algorithm>

#include "huge_pages.h"
#include "parallel.h"
#include "winograd_conv.h"
#include "winograd_patch.h"
#include "winograd_product.h"
#include "workspace.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kFloatsAtOnce = 1024 * 1024;  // of transformed tiles
constexpr int64_t kLeastTiles = 128;            // that are multiplied at once

// Taps of kVector outputs from `first` on, one channel; 0 beyond the last output.
void load_taps(const WinogradPack& args, int64_t first, int64_t channel, Vector g[kTaps][kTaps]) {
  const int64_t outputs = args.gradient ? args.channels : args.outputs;
  const int64_t lane = args.stride[args.gradient ? 1 : 0], base = channel * args.stride[args.gradient ? 0 : 1];
  for (int i = 0; i < kTaps; ++i) {
    for (int j = 0; j < kTaps; ++j) {
      const int64_t row = args.gradient ? kTaps - 1 - i : i, column = args.gradient ? kTaps - 1 - j : j;
      const float* from = args.weight + base + row * args.stride[2] + column * args.stride[3];
      float taps[kVector];
      for (int64_t l = 0; l < kVector; ++l) taps[l] = first + l < outputs ? from[(first + l) * lane] : 0.0f;
      g[i][j] = load_vector(taps);
    }
  }
}

// m[place][outputs] of one tile of the gradient, A Y' A^T, places `stride` apart.
template <class T>
BDFAST_ONE_COPY void gather_gradient(const WinogradWeightGradient& args, const Tiles& tiles, const Place& place,
                                     float* m, int64_t stride) {
  const int64_t rows = tiles.out_height - place.row, columns = tiles.out_width - place.column;
  const T* grad = static_cast<const T*>(args.grad) +
                  ((place.image * tiles.out_height + place.row) * tiles.out_width + place.column) * args.outputs;
  for_vectors(args.outputs, [&](int64_t o) {
    Vector half[kPatch][kTile];
    for (int j = 0; j < kTile; ++j) {
      Vector y[kTile], u[kPatch];
      for (int i = 0; i < kTile; ++i)
        y[i] = i < rows && j < columns ? load_vector(grad + (i * tiles.out_width + j) * args.outputs + o) : Vector{};
      spread_output(y, u);
      for (int i = 0; i < kPatch; ++i) half[i][j] = u[i];
    }
    for (int i = 0; i < kPatch; ++i) {
      Vector u[kPatch];
      spread_output(half[i], u);
      for (int j = 0; j < kPatch; ++j) store_vector(m + (i * kPatch + j) * stride + o, u[j]);
    }
  });
}

// One row of a panel, U of kPanel outputs and one channel, places `stride` apart.
BDFAST_ONE_COPY void pack_channel(const WinogradPack& args, int64_t panel, int64_t channel, float* to, int64_t stride) {
  for (int64_t first = 0; first < kPanel; first += kVector) {
    Vector g[kTaps][kTaps], half[kPatch][kTaps];
    load_taps(args, panel * kPanel + first, channel, g);
    for (int j = 0; j < kTaps; ++j) {
      const Vector column[kTaps] = {g[0][j], g[1][j], g[2][j]};
      Vector u[kPatch];
      transform_weights(column, u);
      for (int i = 0; i < kPatch; ++i) half[i][j] = u[i];
    }
    for (int i = 0; i < kPatch; ++i) {
      Vector u[kPatch];
      transform_weights(half[i], u);
      for (int j = 0; j < kPatch; ++j) store_vector(to + (i * kPatch + j) * stride + first, u[j]);
    }
  }
}

void store_taps(float* to, int64_t stride, Vector value) {
  if (stride == 1) return store_vector(to, value);
  float taps[kVector];
  store_vector(taps, value);
  for (int64_t l = 0; l < kVector; ++l) to[l * stride] = taps[l];
}

// g' of one output from U' [36, outputs, width].
BDFAST_ONE_COPY void collect(const WinogradWeightGradient& args, const float* u, int64_t width, int64_t output) {
  const int64_t place_floats = args.outputs * width;
  for_vectors(args.channels, [&](int64_t c) {
    Vector half[kTaps][kPatch];
    for (int j = 0; j < kPatch; ++j) {
      Vector column[kPatch], g[kTaps];
      for (int i = 0; i < kPatch; ++i)
        column[i] = load_vector(u + (i * kPatch + j) * place_floats + output * width + c);
      collect_weights(column, g);
      for (int i = 0; i < kTaps; ++i) half[i][j] = g[i];
    }
    float* to = args.grad_weight + output * args.stride[0] + c * args.stride[1];
    for (int i = 0; i < kTaps; ++i) {
      Vector g[kTaps];
      collect_weights(half[i], g);
      for (int j = 0; j < kTaps; ++j) store_taps(to + i * args.stride[2] + j * args.stride[3], args.stride[1], g[j]);
    }
  });
}

template <class T>
void weight_gradient(const WinogradWeightGradient& args) {
  const Patches<T> patches{
      static_cast<const T*>(args.x), nullptr, args.height, args.width, args.channels, args.padding};
  const Tiles tiles(args.images, args.height, args.width, args.padding);
  const int64_t panels = ceil_div(args.channels, kPanel), width = panels * kPanel;  // unused columns included
  const int64_t at_once = std::max(kLeastTiles, kFloatsAtOnce / (kPlaces * (args.outputs + width)));
  const int64_t v_floats = at_once * width, m_floats = at_once * args.outputs, u_floats = args.outputs * width;
  static thread_local Workspace workspace;
  float* v = workspace.at_least(kPlaces * (v_floats + m_floats + u_floats));
  float *m = v + kPlaces * v_floats, *u = m + kPlaces * m_floats;
  if (width > args.channels) std::fill(v, v + kPlaces * v_floats, 0.0f);
  if (tiles.count == 0) std::fill(u, u + kPlaces * u_floats, 0.0f);
  for (int64_t first = 0; first < tiles.count; first += at_once) {
    const int64_t count = std::min(at_once, tiles.count - first);
    const int64_t bytes = kPlaces * count * (args.outputs + width) * 4;
    parallel_chunks(count, bytes, [&](int64_t t) {
      const Place place(tiles, first + t);
      gather(patches, place, v + t * width, v_floats);
      gather_gradient<T>(args, tiles, place, m + t * args.outputs, m_floats);
    });
    parallel_chunks(kPlaces * panels, bytes * kRows, [&](int64_t chunk) {
      const int64_t place = chunk / panels, c = chunk % panels * kPanel;
      const Factors rows{m + place * m_floats, 1, args.outputs};
      const Columns columns{v + place * v_floats + c, width};
      float* to = u + place * u_floats + c;
      if (first == 0) return multiply_panel<false>(rows, args.outputs, count, columns, to, width);
      multiply_panel<true>(rows, args.outputs, count, columns, to, width);
    });
  }
  parallel_chunks(args.outputs, kPlaces * u_floats * 4, [&](int64_t o) { collect(args, u, width, o); });
}

}  // namespace

int64_t winograd_packed(int64_t outputs, int64_t channels) {
  return kPlaces * ceil_div(outputs, kPanel) * kPanel * channels;
}

void winograd_pack(const WinogradPack& args) {
  const int64_t outputs = args.gradient ? args.channels : args.outputs;
  const int64_t channels = args.gradient ? args.outputs : args.channels;
  const int64_t panels = ceil_div(outputs, kPanel), place_floats = panels * channels * kPanel;
  prefer_huge_pages(args.packed, kPlaces * place_floats * 4);
  constexpr int64_t kChannels = 16;  // of a chunk
  const int64_t parts = ceil_div(channels, kChannels);
  parallel_chunks(panels * parts, kPlaces * place_floats * 4, [&](int64_t chunk) {
    const int64_t panel = chunk / parts, first = chunk % parts * kChannels;
    for (int64_t c = first; c < std::min(channels, first + kChannels); ++c)
      pack_channel(args, panel, c, args.packed + (panel * channels + c) * kPanel, place_floats);
  });
}

void winograd_weight_gradient(const WinogradWeightGradient& args) {
  if (args.dtype == DType::bfloat16) return weight_gradient<BFloat16>(args);
  weight_gradient<float>(args);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
