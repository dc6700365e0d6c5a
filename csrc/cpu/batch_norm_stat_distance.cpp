// batch_norm_stat_distance on the CPU: one pass over x each way.
//
// Computes   the distance, and its gradient, stated in batch_norm_stat_distance.h.
// A chunk    owns a run of planes of one sample and channel each, or, where channels are next to each other, 64 rows or
//            more of them.
// Moves      forward: reads x; backward: reads x, writes dx.
// Accumulates sums of x - running_mean and of its squares in float64, where subtracting first keeps the variance exact;
//            by plane or chunk and then in order: the number of threads does not change a bit.
#include "batch_norm_stat_distance.h"

#include <algorithm>
#include <vector>

#include "huge_pages.h"
#include "parallel.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 16384;  // elements

// Planes [N, C] of `inner` values, or rows of C channels.
struct Shape {
  explicit Shape(const ChannelLayout& l)
      : by_rows(l.inner == 1),
        lines(by_rows ? l.numel / l.channels : l.numel / l.inner),
        length(by_rows ? l.channels : l.inner),
        lines_of_chunk(std::max<int64_t>(by_rows ? 64 : 1, kChunk / length)),
        chunks((lines + lines_of_chunk - 1) / lines_of_chunk) {}
  int64_t end(int64_t chunk) const { return std::min(lines, (chunk + 1) * lines_of_chunk); }
  bool by_rows;
  int64_t lines, length, lines_of_chunk, chunks;
};

struct Sums {
  double first, second;
};

template <class T>
Sums sums_of_plane(const T* x, int64_t count, double pivot) {
  double first[kLanes] = {}, second[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double d = static_cast<double>(to_float(x[i + lane])) - pivot;
      first[lane] += d;
      second[lane] += d * d;
    }
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    const double d = static_cast<double>(to_float(x[i])) - pivot;
    first[lane] += d;
    second[lane] += d * d;
  }
  // As vectors: one lane after another, this alone took longer than a plane of 4 x 4.
  double sum = 0.0, sum_of_squares = 0.0;
#pragma omp simd reduction(+ : sum, sum_of_squares)
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += first[lane], sum_of_squares += second[lane];
  return {sum, sum_of_squares};
}

template <class T>
void add_row(const T* __restrict__ x, const float* __restrict__ pivot, int64_t channels, double* __restrict__ first,
             double* __restrict__ second) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const double d = static_cast<double>(to_float(x[c])) - static_cast<double>(pivot[c]);
    first[c] += d;
    second[c] += d * d;
  }
}

// [2, C]: the sums of all values of a channel.
template <class T>
std::vector<double> sums_of_channels(const BatchNormStatDistanceArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t channels = a.layout.channels;
  const int64_t bytes = a.layout.numel * static_cast<int64_t>(sizeof(T));
  const Shape shape(a.layout);
  std::vector<double> total(static_cast<size_t>(2 * channels));
  if (shape.by_rows) {
    std::vector<double> partial(static_cast<size_t>(2 * channels * shape.chunks));
    parallel_chunks(shape.chunks, bytes, [&](int64_t chunk) {
      double* first = partial.data() + 2 * channels * chunk;
      for (int64_t row = chunk * shape.lines_of_chunk; row < shape.end(chunk); ++row)
        add_row(x + row * channels, a.running_mean, channels, first, first + channels);
    });
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk)
      for (int64_t i = 0; i < 2 * channels; ++i) total[i] += partial[2 * channels * chunk + i];
    return total;
  }
  std::vector<Sums> partial(static_cast<size_t>(shape.lines));
  parallel_chunks(shape.chunks, bytes, [&](int64_t chunk) {
    const int64_t begin = chunk * shape.lines_of_chunk;
    int64_t channel = begin % channels;
    for (int64_t plane = begin; plane < shape.end(chunk); ++plane) {
      partial[plane] = sums_of_plane(x + plane * shape.length, shape.length, a.running_mean[channel]);
      if (++channel == channels) channel = 0;
    }
  });
  for (int64_t sample = 0; sample < shape.lines / channels; ++sample) {
    const Sums* of_sample = partial.data() + sample * channels;
    for (int64_t c = 0; c < channels; ++c) {
      total[c] += of_sample[c].first;
      total[channels + c] += of_sample[c].second;
    }
  }
  return total;
}

template <class T>
double forward(const BatchNormStatDistanceArgs& a, double* stats) {
  const std::vector<double> sums = sums_of_channels<T>(a);
  const int64_t channels = a.layout.channels;
  const double values = static_cast<double>(a.layout.numel / channels);
  double distance = 0.0;
  for (int64_t c = 0; c < channels; ++c) {
    const double difference = sums[c] / values;
    const double var = sums[channels + c] / values - difference * difference;
    const double excess = var - static_cast<double>(a.running_var[c]);
    stats[c] = static_cast<double>(a.running_mean[c]) + difference;
    stats[channels + c] = var;
    distance += difference * difference + excess * excess;
  }
  return distance;
}

template <class T>
void backward(const BatchNormStatDistanceArgs& a, const double* stats, double grad, T* grad_x) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t channels = a.layout.channels;
  const double factor = 2.0 * grad * static_cast<double>(channels) / static_cast<double>(a.layout.numel);
  // dx = slope * (x - mean) + shift
  std::vector<double> slope(static_cast<size_t>(channels)), shift(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    slope[c] = 2.0 * factor * (stats[channels + c] - static_cast<double>(a.running_var[c]));
    shift[c] = factor * (stats[c] - static_cast<double>(a.running_mean[c]));
  }
  const Shape shape(a.layout);
  const int64_t bytes = a.layout.numel * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(grad_x, bytes);
  parallel_chunks(shape.chunks, 2 * bytes, [&](int64_t chunk) {
    const int64_t begin = chunk * shape.lines_of_chunk;
    int64_t channel = begin % channels;
    for (int64_t line = begin; line < shape.end(chunk); ++line) {
      const T* __restrict__ in = x + line * shape.length;
      T* __restrict__ out = grad_x + line * shape.length;
      if (shape.by_rows) {
        const double* __restrict__ mean = stats;
        const double* __restrict__ k = slope.data(), * __restrict__ b = shift.data();
        for (int64_t i = 0; i < shape.length; ++i)
          store(out + i, static_cast<float>(k[i] * (static_cast<double>(to_float(in[i])) - mean[i]) + b[i]));
      } else {
        const double mean = stats[channel], k = slope[channel], b = shift[channel];
        if (++channel == channels) channel = 0;
        for (int64_t i = 0; i < shape.length; ++i)
          store(out + i, static_cast<float>(k * (static_cast<double>(to_float(in[i])) - mean) + b));
      }
    }
  });
}

}  // namespace

double batch_norm_stat_distance_fwd(const BatchNormStatDistanceArgs& args, double* stats) {
  switch (args.dtype) {
    case DType::float16:
      return forward<Float16>(args, stats);
    case DType::bfloat16:
      return forward<BFloat16>(args, stats);
    default:
      return forward<float>(args, stats);
  }
}

void batch_norm_stat_distance_bwd(const BatchNormStatDistanceArgs& args, const double* stats, float grad,
                                  void* grad_x) {
  switch (args.dtype) {
    case DType::float16:
      return backward(args, stats, grad, static_cast<Float16*>(grad_x));
    case DType::bfloat16:
      return backward(args, stats, grad, static_cast<BFloat16*>(grad_x));
    default:
      return backward(args, stats, grad, static_cast<float*>(grad_x));
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
