// Where the tiles of winograd_tile.h lie in images, and the patches that they are computed from.
#pragma once

#include <cstdint>

#include "winograd_tile.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tiles {
  Tiles(int64_t images, int64_t height, int64_t width, int64_t padding)
      : out_height(height + 2 * padding - 2),
        out_width(width + 2 * padding - 2),
        across(ceil_div(out_width, kTile)),
        an_image(across * ceil_div(out_height, kTile)),
        count(images * an_image) {}

  int64_t out_height, out_width, across, an_image, count;
};

struct Place {  // of a tile: its image and first output
  Place(const Tiles& tiles, int64_t tile)
      : image(tile / tiles.an_image),
        row(tile % tiles.an_image / tiles.across * kTile),
        column(tile % tiles.across * kTile) {}
  int64_t image, row, column;
};

// body(c) for registers of [0, count), the last of which may overlap the one before it.
template <class Body>
inline void for_vectors(int64_t count, const Body& body) {
  int64_t c = 0;
  for (; c + kVector <= count; c += kVector) body(c);
  if (c < count) body(count - kVector);
}

template <class T>
struct Patches {
  const T* x;       // [N, height, width, channels]
  const T* output;  // like x, which counts as 0 where this is <= 0; or null
  int64_t height, width, channels, padding;
};

// v[place][channels] of one patch, B^T d B, places `stride` apart.
template <class T>
BDFAST_ONE_COPY void gather(const Patches<T>& from, const Place& place, float* v, int64_t stride) {
  const int64_t top = place.row - from.padding, left = place.column - from.padding;
  const bool inside = top >= 0 && left >= 0 && top + kPatch <= from.height && left + kPatch <= from.width;
  const int64_t a_row = from.width * from.channels;
  const int64_t corner = (place.image * from.height + top) * a_row + left * from.channels;
  for_vectors(from.channels, [&](int64_t c) {
    Vector half[kPatch][kPatch];
    for (int j = 0; j < kPatch; ++j) {
      Vector d[kPatch], u[kPatch];
      for (int i = 0; i < kPatch; ++i) {
        const bool there = inside || (static_cast<uint64_t>(top + i) < static_cast<uint64_t>(from.height) &&
                                      static_cast<uint64_t>(left + j) < static_cast<uint64_t>(from.width));
        const int64_t at = corner + i * a_row + j * from.channels + c;
        d[i] = there ? load_vector(from.x + at) : Vector{};
        if (there && from.output != nullptr) d[i] = mask_vector(d[i], load_vector(from.output + at));
      }
      transform_input(d, u);
      for (int i = 0; i < kPatch; ++i) half[i][j] = u[i];
    }
    for (int i = 0; i < kPatch; ++i) {
      Vector u[kPatch];
      transform_input(half[i], u);
      for (int j = 0; j < kPatch; ++j) store_vector(v + (i * kPatch + j) * stride + c, u[j]);
    }
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
