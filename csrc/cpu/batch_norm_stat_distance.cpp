// batch_norm_stat_distance on the CPU: one pass over x each way.
//
// Computes   the distance, and its gradient, stated in batch_norm_stat_distance.h.
// A chunk    owns a run of planes of one sample and channel each or, where planes are short or channels are next to each
//            other, up to kBlock columns of 64 rows or more.
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

// Planes with fewer values are columns: forward the end of a plane's sums costs as much as many values, backward a row
// has constants to load.
constexpr int64_t kShortForward = 64, kShortBackward = 16;
constexpr int64_t kBlock = 1024;  // columns whose sums, or constants, stay in L1

// Planes [N, C] of `length` values.
struct Planes {
  explicit Planes(const ChannelLayout& l)
      : count(l.numel / l.inner),
        length(l.inner),
        of_chunk(std::max<int64_t>(1, kChunk / length)),
        chunks((count + of_chunk - 1) / of_chunk) {}
  int64_t end(int64_t chunk) const { return std::min(count, (chunk + 1) * of_chunk); }
  int64_t count, length, of_chunk, chunks;
};

// Rows of columns, of which `inner` next to each other belong to one channel: short planes, or one column a channel.
struct Columns {
  explicit Columns(const ChannelLayout& l)
      : inner(l.inner),
        width(l.channels * l.inner),
        rows(l.numel / width),
        blocks((width + kBlock - 1) / kBlock),
        rows_of_chunk(std::max<int64_t>(64, kChunk / std::min(width, kBlock))),
        groups((rows + rows_of_chunk - 1) / rows_of_chunk) {}
  int64_t chunks() const { return blocks * groups; }
  int64_t group(int64_t chunk) const { return chunk / blocks; }
  int64_t begin(int64_t chunk) const { return chunk % blocks * kBlock; }  // first column
  int64_t count(int64_t chunk) const { return std::min(kBlock, width - begin(chunk)); }
  int64_t first_row(int64_t chunk) const { return group(chunk) * rows_of_chunk; }
  int64_t last_row(int64_t chunk) const { return std::min(rows, first_row(chunk) + rows_of_chunk); }

  // One value a channel, of each of its columns.
  template <class Number>
  std::vector<Number> spread(const Number* of_channel) const {
    std::vector<Number> values(static_cast<size_t>(width));
    for (int64_t column = 0; column < width; column += inner)
      std::fill_n(values.begin() + column, inner, of_channel[column / inner]);
    return values;
  }
  int64_t inner, width, rows, blocks, rows_of_chunk, groups;
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

// Adds kRows rows, `stride` elements apart, to the sums of columns.
template <int64_t kRows, class T>
void add_rows(const T* __restrict__ x, int64_t stride, const float* __restrict__ pivot, int64_t columns,
              double* __restrict__ first, double* __restrict__ second) {
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) {
    double sum = first[c], sum_of_squares = second[c];
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) {
      const double d = static_cast<double>(to_float(x[row * stride + c])) - static_cast<double>(pivot[c]);
      sum += d;
      sum_of_squares += d * d;
    }
    first[c] = sum;
    second[c] = sum_of_squares;
  }
}

// [2, C]: the sums of all values of a channel.
template <class T>
std::vector<double> sums_of_columns(const BatchNormStatDistanceArgs& a, int64_t bytes) {
  const T* x = static_cast<const T*>(a.x);
  const Columns columns(a.layout);
  const int64_t width = columns.width;
  const std::vector<float> pivot = columns.spread(a.running_mean);
  std::vector<double> partial(static_cast<size_t>(2 * width * columns.groups));
  parallel_chunks(columns.chunks(), bytes, [&](int64_t chunk) {
    const int64_t begin = columns.begin(chunk);
    double* first = partial.data() + 2 * width * columns.group(chunk) + begin;
    const T* rows = x + begin;
    const float* p = pivot.data() + begin;
    int64_t row = columns.first_row(chunk);
    for (; row + 4 <= columns.last_row(chunk); row += 4)  // a sum is loaded and stored for four
      add_rows<4>(rows + row * width, width, p, columns.count(chunk), first, first + width);
    for (; row < columns.last_row(chunk); ++row)
      add_rows<1>(rows + row * width, width, p, columns.count(chunk), first, first + width);
  });
  std::vector<double> of_columns(static_cast<size_t>(2 * width));
  for (int64_t group = 0; group < columns.groups; ++group) {
    const double* part = partial.data() + 2 * width * group;
    for (int64_t i = 0; i < 2 * width; ++i) of_columns[i] += part[i];
  }
  if (columns.inner == 1) return of_columns;
  std::vector<double> total(static_cast<size_t>(2 * a.layout.channels));
  for (size_t c = 0; c < total.size(); ++c) {
    const double* values = of_columns.data() + static_cast<int64_t>(c) * columns.inner;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < columns.inner; ++i) sum += values[i];
    total[c] = sum;
  }
  return total;
}

template <class T>
std::vector<double> sums_of_planes(const BatchNormStatDistanceArgs& a, int64_t bytes) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t channels = a.layout.channels;
  const Planes planes(a.layout);
  std::vector<Sums> partial(static_cast<size_t>(planes.count));
  parallel_chunks(planes.chunks, bytes, [&](int64_t chunk) {
    const int64_t begin = chunk * planes.of_chunk;
    int64_t channel = begin % channels;
    for (int64_t plane = begin; plane < planes.end(chunk); ++plane) {
      partial[plane] = sums_of_plane(x + plane * planes.length, planes.length, a.running_mean[channel]);
      if (++channel == channels) channel = 0;
    }
  });
  std::vector<double> total(static_cast<size_t>(2 * channels));
  for (int64_t sample = 0; sample < planes.count / channels; ++sample) {
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
  const int64_t bytes = a.layout.numel * static_cast<int64_t>(sizeof(T));
  const std::vector<double> sums =
      a.layout.inner < kShortForward ? sums_of_columns<T>(a, bytes) : sums_of_planes<T>(a, bytes);
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

// dx = slope * (x - mean) + shift, of each channel.
struct Affine {
  Affine(const BatchNormStatDistanceArgs& a, const double* stats, double grad)
      : mean(stats), slope(static_cast<size_t>(a.layout.channels)), shift(slope.size()) {
    const int64_t channels = a.layout.channels;
    const double factor = 2.0 * grad * static_cast<double>(channels) / static_cast<double>(a.layout.numel);
    for (int64_t c = 0; c < channels; ++c) {
      slope[c] = 2.0 * factor * (stats[channels + c] - static_cast<double>(a.running_var[c]));
      shift[c] = factor * (stats[c] - static_cast<double>(a.running_mean[c]));
    }
  }
  const double* mean;
  std::vector<double> slope, shift;
};

template <class T>
void write_columns(const BatchNormStatDistanceArgs& a, const Affine& dx, T* grad_x, int64_t bytes) {
  const T* x = static_cast<const T*>(a.x);
  const Columns columns(a.layout);
  const std::vector<double> mean = columns.spread(dx.mean), slope = columns.spread(dx.slope.data()),
                            shift = columns.spread(dx.shift.data());
  parallel_chunks(columns.chunks(), 2 * bytes, [&](int64_t chunk) {
    const int64_t begin = columns.begin(chunk), count = columns.count(chunk);
    const double* __restrict__ m = mean.data() + begin;
    const double* __restrict__ k = slope.data() + begin;
    const double* __restrict__ b = shift.data() + begin;
    for (int64_t row = columns.first_row(chunk); row < columns.last_row(chunk); ++row) {
      const T* __restrict__ in = x + row * columns.width + begin;
      T* __restrict__ out = grad_x + row * columns.width + begin;
      for (int64_t i = 0; i < count; ++i)
        store(out + i, static_cast<float>(k[i] * (static_cast<double>(to_float(in[i])) - m[i]) + b[i]));
    }
  });
}

template <class T>
void write_planes(const BatchNormStatDistanceArgs& a, const Affine& dx, T* grad_x, int64_t bytes) {
  const T* x = static_cast<const T*>(a.x);
  const Planes planes(a.layout);
  parallel_chunks(planes.chunks, 2 * bytes, [&](int64_t chunk) {
    const int64_t begin = chunk * planes.of_chunk;
    int64_t channel = begin % a.layout.channels;
    for (int64_t plane = begin; plane < planes.end(chunk); ++plane) {
      const T* __restrict__ in = x + plane * planes.length;
      T* __restrict__ out = grad_x + plane * planes.length;
      const double mean = dx.mean[channel], k = dx.slope[channel], b = dx.shift[channel];
      if (++channel == a.layout.channels) channel = 0;
      for (int64_t i = 0; i < planes.length; ++i)
        store(out + i, static_cast<float>(k * (static_cast<double>(to_float(in[i])) - mean) + b));
    }
  });
}

template <class T>
void backward(const BatchNormStatDistanceArgs& a, const double* stats, double grad, T* grad_x) {
  const Affine dx(a, stats, grad);
  const int64_t bytes = a.layout.numel * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(grad_x, bytes);
  a.layout.inner < kShortBackward ? write_columns(a, dx, grad_x, bytes) : write_planes(a, dx, grad_x, bytes);
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
