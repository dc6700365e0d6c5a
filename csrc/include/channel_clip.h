// Activations clipped channel by channel on the CPU: what clipped_relu and batch_norm_clipped_relu share.
//
//   t = x, or x * scale_c + shift_c      r = max(t, 0)      y = min(r, bound_c), NaN kept
//
// Elements are taken in memory order, in blocks of 512 that pay no heed to where a channel ends: the constants of a
// block are one number where it lies in one channel and laid out element by element elsewhere, so that one loop serves
// every layout. Outputs are stored through the caches: streaming stores were slower at every size, 2 to 64 MB.
//
// What a gradient needs is one bit an element, [0 < t <= bound] for x and [r > bound] for the bound. Bit b of word l of
// block k is element 512 k + 16 b + l: a vector of 16 words collects the bits of 16 elements at a time, with no shuffle.
// bdfast/ops/channels.py states the same layout for the other backends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "channel_layout.h"
#include "dtype.h"
#include "huge_pages.h"
#include "isa.h"
#include "parallel.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

constexpr int64_t kLanes = 16;
constexpr int64_t kBits = 32;
constexpr int64_t kBlock = kLanes * kBits;
constexpr int64_t kChunk = 32 * kBlock;  // 64 KB of float32

// Calls `body(plane, begin, end)` for each run of elements [begin, end) of [first, last) that lie in one plane, one
// channel of one sample.
template <class Body>
void for_each_plane(const ChannelLayout& layout, int64_t first, int64_t last, const Body& body) {
  int64_t plane = first / layout.inner;
  for (int64_t begin = first; begin < last; ++plane) {
    const int64_t end = std::min(last, (plane + 1) * layout.inner);
    body(plane, begin, end);
    begin = end;
  }
}

// Whether the whole block that starts at element `first` lies in one channel.
inline bool in_one_channel(const ChannelLayout& layout, int64_t first) {
  return layout.inner >= kBlock && first / layout.inner == (first + kBlock - 1) / layout.inner;
}

// Values that belong to channels, such as bounds, laid out for the elements of one block after the other.
class ChannelValues {
 public:
  // `values` [channels], alive as long as this.
  ChannelValues(const ChannelLayout& layout, const float* values)
      : layout_(layout), values_(values), period_(layout.channels * layout.inner) {
    if (layout.inner > 1 && (layout.inner >= kBlock || period_ > kMostTabled)) period_ = 0;
    if (period_ == 0) return;
    // Channels follow each other without end: whatever element a block starts with, its values are a run of this table.
    table_.reserve(static_cast<size_t>(period_ + kBlock + layout.inner));
    for (int64_t c = 0; static_cast<int64_t>(table_.size()) < period_ + kBlock; c = c + 1 < layout.channels ? c + 1 : 0)
      table_.insert(table_.end(), static_cast<size_t>(layout.inner), values[c]);
  }

  // The value of each element of the block that starts at `first`, for which `scratch` [kBlock] is there; the only one
  // where `one_channel`.
  const float* block(int64_t first, bool one_channel, float* scratch) const {
    if (one_channel) return values_ + first / layout_.inner % layout_.channels;
    if (period_ > 0) return table_.data() + first % period_;
    for_each_plane(layout_, first, first + kBlock, [&](int64_t plane, int64_t begin, int64_t end) {
      std::fill(scratch + (begin - first), scratch + (end - first), values_[plane % layout_.channels]);
    });
    return scratch;
  }

 private:
  static constexpr int64_t kMostTabled = 32 * 1024;  // 128 KB: 512 channels of 7 x 7, and still in L2

  ChannelLayout layout_;
  const float* values_;
  int64_t period_;  // of the table; 0 where there is none
  std::vector<float> table_;
};

// The `count` elements at `from`, followed by zeros up to a whole block, for which `scratch` [kBlock] is there.
template <class T>
const T* whole_block(const T* from, int64_t count, T* scratch) {
  if (count == kBlock) return from;
  std::copy(from, from + count, scratch);
  std::fill(scratch + count, scratch + kBlock, T{});
  return scratch;
}

// The values of a channel a block are one number (kOneChannel) or one an element.
template <bool kOneChannel>
inline float at(const float* values, int64_t element) {
  return values[kOneChannel ? 0 : element];
}

template <class T, bool kAffine, bool kPass, bool kClip, bool kOneChannel>
void clip_block(const T* __restrict__ x, const float* __restrict__ bound, const float* __restrict__ scale,
                const float* __restrict__ shift, T* __restrict__ y, uint32_t* __restrict__ pass,
                uint32_t* __restrict__ clip) {
  uint32_t pass_words[kLanes] = {}, clip_words[kLanes] = {};
  for (int64_t b = 0; b < kBits; ++b) {
    const int64_t first = b * kLanes;
    float r[kLanes];
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const float value = to_float(x[first + l]);
      const float t = kAffine ? value * at<kOneChannel>(scale, first + l) + at<kOneChannel>(shift, first + l) : value;
      r[l] = t <= 0.0f ? 0.0f : t;
    }
    // Loops of one comparison each: of several, the compiler makes branches, and no vectors.
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const float z = at<kOneChannel>(bound, first + l);
      const float smaller = r[l] > z ? z : r[l];   // keeps a NaN of x
      store(y + first + l, z != z ? z : smaller);  // and one of the bound
    }
    if (kPass) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) {
        const float z = at<kOneChannel>(bound, first + l);
        pass_words[l] |= (static_cast<uint32_t>(r[l] > 0.0f) & static_cast<uint32_t>(r[l] <= z)) << b;
      }
    }
    if (kClip) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l)
        clip_words[l] |= static_cast<uint32_t>(r[l] > at<kOneChannel>(bound, first + l)) << b;
    }
  }
  if (kPass) std::copy(pass_words, pass_words + kLanes, pass);
  if (kClip) std::copy(clip_words, clip_words + kLanes, clip);
}

template <class T, bool kAffine, bool kOneChannel>
auto choose_clip_block(bool pass, bool clip) {
  return pass ? (clip ? clip_block<T, kAffine, true, true, kOneChannel>
                      : clip_block<T, kAffine, true, false, kOneChannel>)
              : (clip ? clip_block<T, kAffine, false, true, kOneChannel>
                      : clip_block<T, kAffine, false, false, kOneChannel>);
}

// Writes `y`, of the layout of `x`, and the bits of `pass` and `clip`, [blocks, 16] words, where these are not null.
// `scale` and `shift` are read where kAffine.
template <class T, bool kAffine>
void clip_forward(const ChannelLayout& layout, const T* x, const ChannelValues& bound, const ChannelValues* scale,
                  const ChannelValues* shift, T* y, uint32_t* pass, uint32_t* clip) {
  auto* const mixed_block = choose_clip_block<T, kAffine, false>(pass != nullptr, clip != nullptr);
  auto* const channel_block = choose_clip_block<T, kAffine, true>(pass != nullptr, clip != nullptr);
  const int64_t bytes = layout.numel * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(y, bytes);
  parallel_chunks((layout.numel + kChunk - 1) / kChunk, 2 * bytes, [&](int64_t chunk) {
    float bounds[kBlock], scales[kBlock], shifts[kBlock];
    T in[kBlock], out[kBlock];
    const int64_t last = std::min(layout.numel, (chunk + 1) * kChunk);
    for (int64_t first = chunk * kChunk; first < last; first += kBlock) {
      const int64_t count = std::min(kBlock, last - first);
      const int64_t words = first / kBits;
      const bool one = in_one_channel(layout, first);
      auto* const block = one ? channel_block : mixed_block;
      block(whole_block(x + first, count, in), bound.block(first, one, bounds),
            kAffine ? scale->block(first, one, scales) : nullptr, kAffine ? shift->block(first, one, shifts) : nullptr,
            count == kBlock ? y + first : out, pass != nullptr ? pass + words : nullptr,
            clip != nullptr ? clip + words : nullptr);
      if (count < kBlock) std::copy(out, out + count, y + first);
    }
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
