// Two passes over activations where the second needs sums of the first, channel by channel: batch_norm_relu both ways.
//
// An operation `Op` has
//   kConstants                     how many floats a channel each pass is given
//   kRowsAtOnce                    rows of columns whose terms are added at once
//   constants()                    [kConstants, channels]; `begin` and `end` fill it in
//   bytes()                        of the tensors that both passes read, an element
//   written()                      bytes that the second pass writes
//   begin(c)                       before the sums of channel c
//   terms(element, k, column)      the two terms that an element adds; k(row, column) are the constants of its channel
//   end(c, sums)                   between the passes
//   write(element, count, k, past)     what the second pass writes for a run of elements, past the caches if asked to
//
// Planes, the values of one channel of one sample that are next to each other, are walked one after the other, and both
// passes of a channel follow each other where its planes fit in a cache. Where planes are short or there are none
// (channels_last, [N, C]) elements are rows of columns, each of which belongs to one channel.
//
// Sums are float32 in lanes (or columns) for some hundred values at most, and of these in float64, in an order that
// follows from sizes alone: neither the number of threads nor which of the ways above is taken changes a bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "channel_layout.h"
#include "isa.h"
#include "parallel.h"
#include "streaming.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

template <class Number>
struct Sums {
  Number first, second;
};

// Constants of one channel, and those of consecutive columns.
template <int kRows>
struct OfChannel {
  OfChannel(const float* constants, int64_t channels, int64_t c) {
    for (int row = 0; row < kRows; ++row) values[row] = constants[row * channels + c];
  }
  float operator()(int row, int64_t) const { return values[row]; }
  float values[kRows];
};
struct OfColumns {
  float operator()(int row, int64_t column) const { return table[row * stride + column]; }
  const float* table;
  int64_t stride;
};

// --- planes ----------------------------------------------------------------------------------------------------------

constexpr int64_t kPlane = 128;     // shorter ones are columns: the end of a run costs as much as 64 elements
constexpr int64_t kRun = 4096;      // elements whose sums are float32
constexpr int64_t kSumLanes = 32;   // of a run
constexpr int64_t kNear = 2 << 20;  // bytes that a thread finds again in its caches
// Bytes in a row that are worth going to. Of 128 x 64 x 32 x 32 in float32, forward, four neighbouring channels at a
// time took 0.74 of the time of one or two, though their planes leave L2.
constexpr int64_t kStretch = 16 << 10;

template <class Op, class Constants>
BDFAST_ONE_COPY Sums<double> sums_of_run(const Op& op, int64_t begin, int64_t count, const Constants& k) {
  float first[kSumLanes] = {}, second[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kSumLanes; ++lane) {
      const Sums<float> term = op.terms(begin + i + lane, k, 0);
      first[lane] += term.first;
      second[lane] += term.second;
    }
  }
#pragma omp simd
  for (int64_t lane = 0; lane < count - i; ++lane) {
    const Sums<float> term = op.terms(begin + i + lane, k, 0);
    first[lane] += term.first;
    second[lane] += term.second;
  }
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      first[lane] += first[lane + half];
      second[lane] += second[lane + half];
    }
  }
  return {first[0], second[0]};
}

template <class Op>
class PlanePasses {
 public:
  PlanePasses(const ChannelLayout& layout, Op& op)
      : op_(op),
        channels_(layout.channels),
        inner_(layout.inner),
        planes_(layout.numel / layout.inner),
        runs_((layout.inner + kRun - 1) / kRun),
        bytes_(layout.numel * op.bytes()) {}

  void run() {
    const int64_t threads = most_threads(), channel_bytes = bytes_ / channels_;
    const int64_t most = std::min(kNear / std::max<int64_t>(1, channel_bytes), channels_ / (2 * threads));
    const int64_t group = std::max<int64_t>(1, std::min(most, kStretch / (inner_ * op_.bytes())));
    if (channel_bytes > kNear || channels_ < threads) return one_after_the_other();
    parallel_chunks((channels_ + group - 1) / group, 2 * bytes_,
                    [&](int64_t chunk) { both_passes(chunk * group, std::min(channels_, (chunk + 1) * group)); });
  }

 private:
  OfChannel<Op::kConstants> constants(int64_t c) const { return {op_.constants(), channels_, c}; }
  int64_t length(int64_t run) const { return std::min(kRun, inner_ - run * kRun); }

  // Of channels [first, last), while what the first pass read is in the cache.
  void both_passes(int64_t first, int64_t last) {
    std::vector<Sums<double>> totals(static_cast<size_t>(last - first));
    for (int64_t c = first; c < last; ++c) op_.begin(c);
    for (int64_t sample = 0; sample < planes_; sample += channels_)
      for (int64_t c = first; c < last; ++c)
        for (int64_t run = 0; run < runs_; ++run) add(totals[c - first], sums(sample + c, run));
    for (int64_t c = first; c < last; ++c) op_.end(c, totals[c - first]);
    const bool past = op_.written() >= kStreamedBytes;
    for (int64_t sample = planes_ - channels_; sample >= 0; sample -= channels_)
      for (int64_t c = first; c < last; ++c) op_.write((sample + c) * inner_, inner_, constants(c), past);
    if (past) end_streaming();
  }

  void one_after_the_other() {
    const int64_t units = planes_ * runs_;
    std::vector<Sums<double>> partial(static_cast<size_t>(units));
    parallel_chunks(channels_, bytes_, [&](int64_t c) { op_.begin(c); });
    parallel_chunks(units, bytes_, [&](int64_t unit) { partial[unit] = sums(unit / runs_, unit % runs_); });
    parallel_chunks(channels_, bytes_, [&](int64_t c) {
      Sums<double> total{};
      for (int64_t sample = 0; sample < planes_; sample += channels_)
        for (int64_t run = 0; run < runs_; ++run) add(total, partial[(sample + c) * runs_ + run]);
      op_.end(c, total);
    });
    parallel_chunks(units, 2 * bytes_, [&](int64_t reversed) {
      const int64_t unit = units - 1 - reversed;
      const int64_t plane = unit / runs_, run = unit % runs_;
      op_.write(plane * inner_ + run * kRun, length(run), constants(plane % channels_), false);
    });
  }

  Sums<double> sums(int64_t plane, int64_t run) const {
    return sums_of_run(op_, plane * inner_ + run * kRun, length(run), constants(plane % channels_));
  }
  static void add(Sums<double>& total, const Sums<double>& part) {
    total.first += part.first;
    total.second += part.second;
  }

  Op& op_;
  int64_t channels_, inner_, planes_, runs_, bytes_;
};

// --- columns ---------------------------------------------------------------------------------------------------------

template <class Op>
class ColumnPasses {
 public:
  ColumnPasses(const ChannelLayout& layout, Op& op)
      : op_(op),
        layout_(layout),
        period_(layout.channels * layout.inner),
        width_(period_ * std::max<int64_t>(1, kColumns / period_)),
        stride_(width_ + kApart),
        rows_((layout.numel + width_ - 1) / width_),
        chunks_across_((width_ + kColumns - 1) / kColumns),
        rows_of_chunk_(std::max(kFewRows, std::min(kRows, rows_ * chunks_across_ / kChunks))),
        chunks_((rows_ + rows_of_chunk_ - 1) / rows_of_chunk_ * chunks_across_),
        bytes_(layout.numel * op.bytes()),
        table_(static_cast<size_t>(Op::kConstants * stride_)) {}

  void run() {
    for (int64_t c = 0; c < layout_.channels; ++c) op_.begin(c);
    fill_table();
    std::vector<double> partial(static_cast<size_t>(2 * period_ * (chunks_ / chunks_across_)));
    parallel_chunks(chunks_, bytes_, [&](int64_t chunk) { add_chunk(chunk, partial.data()); });
    end_channels(partial);
    fill_table();
    // From the end: what the first pass read last is still in a cache.
    parallel_chunks(chunks_, 2 * bytes_, [&](int64_t reversed) { write_chunk(chunks_ - 1 - reversed); });
  }

 private:
  // Of a chunk; shorter rows are joined. Rows of 256 or 512 are 1.3 times as fast in a cache, but take 1.4 times as long from
  // memory, where rows that are added at once are as many streams.
  static constexpr int64_t kColumns = 1024;
  static constexpr int64_t kAtOnce = Op::kRowsAtOnce;
  static constexpr int64_t kApart = 80;  // between the tables of two constants: 4 KB apart they would share lines of L1
  static constexpr int64_t kRows = 64;   // of a chunk, as long as there are
  static constexpr int64_t kChunks = 32;   // that many; fewer rows for more threads where there is little, but not
  static constexpr int64_t kFewRows = 16;  // so few that the sums of chunks are worth counting

  int64_t channel(int64_t column) const { return column / layout_.inner % layout_.channels; }
  OfColumns constants(int64_t column) const { return {table_.data() + column, stride_}; }

  void fill_table() {
    const float* from = op_.constants();
    for (int row = 0; row < Op::kConstants; ++row)
      for (int64_t i = 0; i < width_;) {
        const float value = from[row * layout_.channels + channel(i)];
        for (int64_t k = 0; k < layout_.inner; ++k) table_[row * stride_ + i++] = value;
      }
  }

  // Calls `body(first, rows, column, columns)` with the whole rows of a chunk, and with what there is of a last one.
  template <class Body>
  void blocks_of(int64_t chunk, const Body& body) const {
    const int64_t column = chunk % chunks_across_ * kColumns;
    const int64_t columns = std::min(kColumns, width_ - column);
    const int64_t first = chunk / chunks_across_ * rows_of_chunk_;
    const int64_t last = std::min(rows_, first + rows_of_chunk_);
    const int64_t whole = std::max(first, std::min(last, layout_.numel / width_));
    body(first, whole - first, column, columns);
    if (whole < last) body(whole, 1, column, std::min(columns, layout_.numel % width_ - column));  // none if not > 0
  }

  void add_chunk(int64_t chunk, double* partial) const {
    float first[kColumns] = {}, second[kColumns] = {};
    blocks_of(chunk, [&](int64_t begin, int64_t rows, int64_t column, int64_t columns) {
      const OfColumns k = constants(column);
      int64_t row = begin;
      for (; row + kAtOnce <= begin + rows; row += kAtOnce)
        add_rows<kAtOnce>(row * width_ + column, columns, k, first, second);
      for (; row < begin + rows; ++row) add_rows<1>(row * width_ + column, columns, k, first, second);
    });
    const int64_t column = chunk % chunks_across_ * kColumns;
    double* to = partial + chunk / chunks_across_ * 2 * period_;
    for (int64_t i = 0, at = column; i < std::min(kColumns, width_ - column); ++i, ++at) {
      if (at == period_) at = 0;
      to[at] += first[i];
      to[period_ + at] += second[i];
    }
  }

  template <int64_t kRowsAtOnce>
  BDFAST_ONE_COPY void add_rows(int64_t begin, int64_t columns, const OfColumns& k, float* __restrict__ first,
                                float* __restrict__ second) const {
    const int64_t width = width_;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      Sums<float> sum = op_.terms(begin + i, k, i);
      for (int64_t row = 1; row < kRowsAtOnce; ++row) {
        const Sums<float> term = op_.terms(begin + row * width + i, k, i);
        sum.first += term.first;
        sum.second += term.second;
      }
      first[i] += sum.first;
      second[i] += sum.second;
    }
  }

  void end_channels(const std::vector<double>& partial) {
    std::vector<double> of_column(static_cast<size_t>(2 * period_));
    for (size_t begin = 0; begin < partial.size(); begin += of_column.size())
      for (size_t i = 0; i < of_column.size(); ++i) of_column[i] += partial[begin + i];
    std::vector<Sums<double>> totals(static_cast<size_t>(layout_.channels));
    for (int64_t i = 0; i < period_; ++i) {
      totals[i / layout_.inner].first += of_column[i];
      totals[i / layout_.inner].second += of_column[period_ + i];
    }
    for (int64_t c = 0; c < layout_.channels; ++c) op_.end(c, totals[c]);
  }

  void write_chunk(int64_t chunk) const {
    blocks_of(chunk, [&](int64_t begin, int64_t rows, int64_t column, int64_t columns) {
      for (int64_t row = begin; row < begin + rows; ++row)
        op_.write(row * width_ + column, columns, constants(column), false);
    });
  }

  Op& op_;
  ChannelLayout layout_;
  int64_t period_, width_, stride_, rows_, chunks_across_, rows_of_chunk_, chunks_, bytes_;
  std::vector<float> table_;
};

template <class Op>
void two_passes(const ChannelLayout& layout, Op op) {
  if (layout.inner >= kPlane)
    PlanePasses<Op>(layout, op).run();
  else
    ColumnPasses<Op>(layout, op).run();
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
