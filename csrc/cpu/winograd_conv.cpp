// 3x3 convolutions on the CPU, by Winograd's F(4x4, 3x3).
//
// Computes   what winograd_conv.h states, in the tiles of winograd_tile.h.
// A chunk    owns some tiles of 4x4 outputs, and all outputs or some panels of them: patches are transformed, 36 products
//            follow, and their results are transformed back, in buffers that stay in the cache.
// Moves      reads x, 36 / 16 times from a cache, the weights once a chunk, the shortcut; writes y.
// Accumulates in float32, over channels in order: an image's result does not depend on the others or on threads.
#include "winograd_conv.h"

#include <algorithm>

#include "huge_pages.h"
#include "parallel.h"
#include "winograd_patch.h"
#include "winograd_product.h"
#include "workspace.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kTilesAtOnce = 2 * kRows;  // of a chunk: its buffers fit in a core's own cache up to 256 channels

// The outputs [first, last) of one tile from m[place][last - first], places `stride` apart.
template <class T>
BDFAST_ONE_COPY void scatter(const WinogradConv& args, const Tiles& tiles, const Place& place, const float* m,
                             int64_t stride, int64_t first, int64_t last) {
  const int64_t rows = std::min<int64_t>(kTile, tiles.out_height - place.row);
  const int64_t columns = std::min<int64_t>(kTile, tiles.out_width - place.column);
  const int64_t corner =
      ((place.image * tiles.out_height + place.row) * tiles.out_width + place.column) * args.outputs + first;
  T* y = static_cast<T*>(args.y) + corner;
  const T* shortcut = args.shortcut == nullptr ? nullptr : static_cast<const T*>(args.shortcut) + corner;
  for_vectors(last - first, [&](int64_t o) {
    Vector half[kTile][kPatch];
    for (int j = 0; j < kPatch; ++j) {
      Vector column[kPatch], u[kTile];
      for (int i = 0; i < kPatch; ++i) column[i] = load_vector(m + (i * kPatch + j) * stride + o);
      transform_output(column, u);
      for (int i = 0; i < kTile; ++i) half[i][j] = u[i];
    }
    const Vector bias = args.bias == nullptr ? Vector{} : load_vector(args.bias + first + o);
    for (int i = 0; i < rows; ++i) {
      Vector u[kTile];
      transform_output(half[i], u);
      for (int j = 0; j < columns; ++j) {
        const int64_t at = (i * tiles.out_width + j) * args.outputs + o;
        Vector value = u[j] + bias;
        if (shortcut != nullptr) value += load_vector(shortcut + at);
        store_vector(y + at, args.relu ? relu_vector(value) : value);
      }
    }
  });
}

// Which tiles and outputs a chunk owns.
struct Plan {
  explicit Plan(const WinogradConv& args, const Tiles& tiles) : blocks(ceil_div(tiles.count, kTilesAtOnce)) {
    // Fewer blocks than threads: each is shared out by outputs, and every share transforms the patches again.
    const int64_t panels = ceil_div(args.outputs, kPanel);
    const int64_t wanted = std::min(panels, ceil_div(most_threads(), std::max<int64_t>(blocks, 1)));
    outputs_a_share = ceil_div(panels, wanted) * kPanel;
    shares = std::max<int64_t>(args.outputs / outputs_a_share, 1);  // the last one takes what is left over
  }
  int64_t blocks, outputs_a_share, shares;
};

template <class T>
void convolve(const WinogradConv& args) {
  const Patches<T> patches{static_cast<const T*>(args.x),
                           static_cast<const T*>(args.output),
                           args.height,
                           args.width,
                           args.channels,
                           args.padding};
  const Tiles tiles(args.images, args.height, args.width, args.padding);
  const Plan plan(args, tiles);
  const int64_t panel_floats = args.channels * kPanel;
  const int64_t place_floats = ceil_div(args.outputs, kPanel) * panel_floats;
  prefer_huge_pages(args.y, args.images * tiles.out_height * tiles.out_width * args.outputs * int64_t{sizeof(T)});
  const int64_t products = kPlaces * tiles.count * args.channels * args.outputs;
  parallel_chunks(plan.blocks * plan.shares, products, [&](int64_t chunk) {
    const int64_t first_tile = chunk / plan.shares * kTilesAtOnce, share = chunk % plan.shares;
    const int64_t count = std::min(kTilesAtOnce, tiles.count - first_tile);
    const int64_t first = share * plan.outputs_a_share;
    const int64_t last = share + 1 < plan.shares ? first + plan.outputs_a_share : args.outputs;
    const int64_t width = ceil_div(last - first, kPanel) * kPanel;  // of a row of results, unused columns included
    static thread_local Workspace workspace;
    const int64_t v_stride = count * args.channels, m_stride = count * width;
    float* v = workspace.at_least(kPlaces * count * (args.channels + width));
    float* m = v + kPlaces * v_stride;
    for (int64_t t = 0; t < count; ++t) gather(patches, Place(tiles, first_tile + t), v + t * args.channels, v_stride);
    for (int64_t place = 0; place < kPlaces; ++place)
      for (int64_t o = first; o < last; o += kPanel)
        multiply_panel<false>({v + place * v_stride, args.channels, 1}, count, args.channels,
                              {args.weights + place * place_floats + o / kPanel * panel_floats, kPanel},
                              m + place * m_stride + (o - first), width);
    for (int64_t t = 0; t < count; ++t)
      scatter<T>(args, tiles, Place(tiles, first_tile + t), m + t * width, m_stride, first, last);
  });
}

}  // namespace

void winograd_conv(const WinogradConv& args) {
  if (args.dtype == DType::bfloat16) return convolve<BFloat16>(args);
  convolve<float>(args);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
