// clipped_relu on the CPU. The backward serves batch_norm_clipped_relu too, which differs by a factor a channel.
//
// Computes   y = min(max(x, 0), bound);   dx = g * scale * [0 < t <= bound],   dbound_c = sum of g * [r > bound] over c
// A chunk    owns 16,384 consecutive elements (more in rows of many channels), 512 at a time.
// Moves      forward: reads x, writes y; backward: reads g, writes dx; and one bit an element a gradient, both ways.
// Accumulates the bound's gradient in float64, plane by plane or row by row within a chunk, and then in the order of
//            chunks: the number of threads does not change a bit.
#include "clipped_relu.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "channel_clip.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

// `value` where the lowest bit is set, else 0, also for infinite values and NaN; arithmetic, so that loops vectorise.
inline float keep_if(uint32_t bit, float value) { return bits_to_float(float_to_bits(value) & (0u - (bit & 1u))); }

template <class T, bool kAffine, bool kPass, bool kClip, bool kOneChannel>
bool backward_block(const T* __restrict__ grad, const float* __restrict__ scale, const uint32_t* pass,
                    const uint32_t* clip, T* __restrict__ grad_x, float* __restrict__ clipped) {
  for (int64_t b = 0; b < kBits; ++b) {
    const int64_t first = b * kLanes;
    if (kPass) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) {
        const float g = to_float(grad[first + l]) * (kAffine ? at<kOneChannel>(scale, first + l) : 1.0f);
        store(grad_x + first + l, keep_if(pass[l] >> b, g));
      }
    }
    if (kClip) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) clipped[first + l] = keep_if(clip[l] >> b, to_float(grad[first + l]));
    }
  }
  uint32_t any = 0;
  if (kClip)
    for (int64_t l = 0; l < kLanes; ++l) any |= clip[l];
  return any != 0;
}

// Eight running sums, whatever the vectors of the processor: planes may be as small as 2 x 2.
inline double sum_in_lanes(const float* values, int64_t count) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
#pragma omp simd
    for (int64_t l = 0; l < 8; ++l) lanes[l] += values[i + l];
  }
  for (; i < count; ++i) lanes[i % 8] += values[i];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Sums of values over channels, in float64: partial sums of chunks that any thread may make, added in order.
class ChannelSums {
 public:
  ChannelSums(const ChannelLayout& layout, int64_t chunk_size, bool needed)
      : layout_(layout),
        chunk_size_(chunk_size),
        chunks_((layout.numel + chunk_size - 1) / chunk_size),
        planes_((layout.numel + layout.inner - 1) / layout.inner) {
    if (needed) partial_.resize(static_cast<size_t>(layout.inner == 1 ? chunks_ * layout.channels : planes_ + chunks_));
  }

  // What one chunk adds up; `values` [kBlock] belong to the elements from `first` on, zeros behind the last.
  class Chunk {
   public:
    Chunk(ChannelSums* sums, int64_t chunk) : sums_(sums), chunk_(chunk) {
      // As in ChannelValues: with channels next to each other, a block adds to a run of a table.
      if (sums->layout_.inner == 1 && !sums->partial_.empty())
        table_.resize(static_cast<size_t>(sums->layout_.channels + kBlock));
    }

    void add(int64_t first, int64_t count, const float* values) {
      const ChannelLayout& layout = sums_->layout_;
      if (layout.inner == 1) {
        double* __restrict__ run = table_.data() + first % layout.channels;
#pragma omp simd
        for (int64_t i = 0; i < kBlock; ++i) run[i] += values[i];
        return;
      }
      for_each_plane(layout, first, first + count, [&](int64_t plane, int64_t begin, int64_t end) {
        const double sum = sum_in_lanes(values + (begin - first), end - begin);
        // Plane and chunk never decrease along the elements and one of them grows: their sum is a place of its own.
        sums_->partial_[static_cast<size_t>(plane + chunk_)] += sum;
      });
    }

    void finish() {
      const int64_t channels = sums_->layout_.channels;
      double* row = sums_->partial_.data() + chunk_ * channels;
      for (size_t i = 0; i < table_.size(); ++i) row[static_cast<int64_t>(i) % channels] += table_[i];
    }

   private:
    ChannelSums* sums_;
    int64_t chunk_;
    std::vector<double> table_;
  };

  std::vector<double> total() const {
    std::vector<double> sums(static_cast<size_t>(layout_.channels));
    if (layout_.inner == 1) {
      for (int64_t i = 0; i < chunks_ * layout_.channels; ++i) sums[i % layout_.channels] += partial_[i];
      return sums;
    }
    for (int64_t plane = 0; plane < planes_; ++plane) {
      const int64_t last = std::min(layout_.numel, (plane + 1) * layout_.inner) - 1;
      for (int64_t chunk = plane * layout_.inner / chunk_size_; chunk <= last / chunk_size_; ++chunk)
        sums[plane % layout_.channels] += partial_[plane + chunk];
    }
    return sums;
  }

 private:
  ChannelLayout layout_;
  int64_t chunk_size_;
  int64_t chunks_;
  int64_t planes_;
  std::vector<double> partial_;
};

template <class T, bool kOneChannel>
auto choose_backward_block(bool affine, bool pass, bool clip) {
  if (!clip)
    return affine ? backward_block<T, true, true, false, kOneChannel>
                  : backward_block<T, false, true, false, kOneChannel>;
  if (!pass) return backward_block<T, false, false, true, kOneChannel>;
  return affine ? backward_block<T, true, true, true, kOneChannel> : backward_block<T, false, true, true, kOneChannel>;
}

template <class T>
void backward(const ClippedReluGradArgs& a, T* grad_x, float* grad_bound) {
  const ChannelLayout& layout = a.layout;
  const T* grad = static_cast<const T*>(a.grad);
  const bool pass = a.pass != nullptr, clip = a.clip != nullptr, affine = a.scale != nullptr;
  auto* const mixed_block = choose_backward_block<T, false>(affine, pass, clip);
  auto* const channel_block = choose_backward_block<T, true>(affine, pass, clip);
  // A chunk leaves one float64 a channel behind where channels are next to each other: 64 rows make that a trifle.
  const int64_t rows = (64 * layout.channels + kBlock - 1) / kBlock * kBlock;
  const int64_t chunk_size = layout.inner == 1 && clip ? std::max(kChunk, rows) : kChunk;
  std::optional<ChannelValues> scale;
  if (affine) scale.emplace(layout, a.scale);
  ChannelSums sums(layout, chunk_size, clip);
  const int64_t bytes = layout.numel * static_cast<int64_t>(sizeof(T));
  if (pass) prefer_huge_pages(grad_x, bytes);
  parallel_chunks((layout.numel + chunk_size - 1) / chunk_size, 2 * bytes, [&](int64_t chunk) {
    float scales[kBlock];
    ChannelSums::Chunk sum(&sums, chunk);
    T in[kBlock], out[kBlock];
    float clipped[kBlock];
    const int64_t last = std::min(layout.numel, (chunk + 1) * chunk_size);
    for (int64_t first = chunk * chunk_size; first < last; first += kBlock) {
      const int64_t count = std::min(kBlock, last - first);
      const int64_t words = first / kBits;
      const bool one = in_one_channel(layout, first);
      auto* const block = one ? channel_block : mixed_block;
      const bool any = block(whole_block(grad + first, count, in), affine ? scale->block(first, one, scales) : nullptr,
                             pass ? a.pass + words : nullptr, clip ? a.clip + words : nullptr,
                             count == kBlock ? grad_x + first : out, clipped);
      if (any) sum.add(first, count, clipped);
      if (pass && count < kBlock) std::copy(out, out + count, grad_x + first);
    }
    sum.finish();
  });
  if (!clip) return;
  const std::vector<double> total = sums.total();
  if (a.bounds == layout.channels) {
    for (int64_t c = 0; c < layout.channels; ++c) grad_bound[c] = static_cast<float>(total[c]);
  } else {
    *grad_bound = static_cast<float>(std::accumulate(total.begin(), total.end(), 0.0));
  }
}

template <class T>
void forward(const ClippedReluArgs& a, T* y, uint32_t* pass, uint32_t* clip) {
  const ChannelValues bound(a.layout, a.bound);
  clip_forward<T, false>(a.layout, static_cast<const T*>(a.x), bound, nullptr, nullptr, y, pass, clip);
}

}  // namespace

void clipped_relu_fwd(const ClippedReluArgs& args, void* y, uint32_t* pass, uint32_t* clip) {
  switch (args.dtype) {
    case DType::float16:
      return forward(args, static_cast<Float16*>(y), pass, clip);
    case DType::bfloat16:
      return forward(args, static_cast<BFloat16*>(y), pass, clip);
    default:
      return forward(args, static_cast<float*>(y), pass, clip);
  }
}

void clipped_relu_bwd(const ClippedReluGradArgs& args, void* grad_x, float* grad_bound) {
  switch (args.dtype) {
    case DType::float16:
      return backward(args, static_cast<Float16*>(grad_x), grad_bound);
    case DType::bfloat16:
      return backward(args, static_cast<BFloat16*>(grad_x), grad_bound);
    default:
      return backward(args, static_cast<float*>(grad_x), grad_bound);
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
