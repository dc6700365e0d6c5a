// masked_pgd_step_ on the CPU: the patches alone, in runs of elements that are next to each other in memory.
//
// Computes   the step stated in masked_pgd_step.h.
// A chunk    owns a band of rows of one image's patch.
// Moves      reads x_adv, x and grad and writes x_adv, inside the patch.
// Accumulates nothing; computes in float32.
#include "masked_pgd_step.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kBand = 64 * 1024;  // elements of a chunk

// Bounds of the elements of a run: those of one channel, or a table of one entry an element.
struct OneChannel {
  PgdBounds bounds;
  PgdBounds at(int64_t) const { return bounds; }
  OneChannel from(int64_t) const { return *this; }
};

struct Table {
  const float *step_size, *eps, *lower, *upper;
  PgdBounds at(int64_t i) const { return {step_size[i], eps[i], lower[i], upper[i]}; }
  Table from(int64_t i) const { return {step_size + i, eps + i, lower + i, upper + i}; }
};

template <class T, class Bounds>
inline void step_elements(T* __restrict__ x_adv, const T* __restrict__ x, const T* __restrict__ grad, int64_t count,
                          const Bounds bounds) {
  for (int64_t i = 0; i < count; ++i)
    store(x_adv + i, pgd_step(to_float(x_adv[i]), to_float(x[i]), to_float(grad[i]), bounds.at(i)));
}

#ifdef __AVX512F__
// A run of kWidth to 2 kWidth elements as two vectors that may overlap, both made from old values: the rows of a patch are
// short, and what does not fill a vector of 16 goes through much slower loops.
template <int64_t kWidth, class T, class Bounds>
void step_ends(T* x_adv, const T* x, const T* grad, int64_t count, const Bounds bounds) {
  const int64_t rest = count - kWidth;
  T first[kWidth], last[kWidth];
  std::copy(x_adv, x_adv + kWidth, first);
  std::copy(x_adv + rest, x_adv + count, last);
  step_elements(first, x, grad, kWidth, bounds);
  step_elements(last, x + rest, grad + rest, kWidth, bounds.from(rest));
  std::copy(first, first + kWidth, x_adv);
  std::copy(last, last + kWidth, x_adv + rest);
}
#endif

template <class T, class Bounds>
void step_run(T* x_adv, const T* x, const T* grad, int64_t count, const Bounds bounds) {
#ifdef __AVX512F__
  if (count > 16 && count < 32) return step_ends<16>(x_adv, x, grad, count, bounds);
  if (count >= 8 && count < 16) return step_ends<8>(x_adv, x, grad, count, bounds);
#endif
  step_elements(x_adv, x, grad, count, bounds);
}

int64_t offset(const ImageStrides& s, int64_t sample, int64_t channel, int64_t row, int64_t column) {
  return sample * s.sample + channel * s.channel + row * s.row + column * s.column;
}

template <class T>
class Step {
 public:
  explicit Step(const MaskedPgdStepArgs& args)
      : args_(args),
        x_adv_(static_cast<T*>(args.x_adv)),
        x_(static_cast<const T*>(args.x)),
        grad_(static_cast<const T*>(args.grad)) {
    const ImageStrides strides[] = {args.x_adv_strides, args.x_strides, args.grad_strides};
    const int64_t channels = args.geometry.channels;
    columns_ = pixels_ = true;
    for (const ImageStrides& s : strides) {
      columns_ &= s.column == 1;
      pixels_ &= s.channel == 1 && s.column == channels;
    }
    for (int64_t c = 0; c < channels; ++c) of_channel_.push_back(bounds_of_channel(args, c));
    if (!columns_ && pixels_) make_table();
  }

  void band(int64_t sample, const Patch& patch) const {
    if (columns_) {
      for (int64_t c = 0; c < args_.geometry.channels; ++c)
        rows(sample, c, patch, patch.right - patch.left, OneChannel{of_channel_[c]});
    } else if (pixels_) {
      rows(sample, 0, patch, (patch.right - patch.left) * args_.geometry.channels,
           Table{entries(0), entries(1), entries(2), entries(3)});
    } else {
      elements(sample, patch);
    }
  }

 private:
  void make_table() {
    const int64_t channels = args_.geometry.channels;
    table_.resize(static_cast<size_t>(4 * row_length()));
    for (int64_t i = 0; i < row_length(); ++i) {
      const PgdBounds& b = of_channel_[i % channels];
      const float values[] = {b.step_size, b.eps, b.lower, b.upper};
      for (int64_t kind = 0; kind < 4; ++kind) table_[kind * row_length() + i] = values[kind];
    }
  }

  int64_t row_length() const { return args_.geometry.width * args_.geometry.channels; }
  const float* entries(int64_t kind) const { return table_.data() + kind * row_length(); }

  template <class Bounds>
  void rows(int64_t sample, int64_t channel, const Patch& patch, int64_t length, const Bounds& bounds) const {
    T* x_adv = x_adv_ + offset(args_.x_adv_strides, sample, channel, patch.top, patch.left);
    const T* x = x_ + offset(args_.x_strides, sample, channel, patch.top, patch.left);
    const T* grad = grad_ + offset(args_.grad_strides, sample, channel, patch.top, patch.left);
    for (int64_t row = patch.top; row < patch.bottom; ++row) {
      step_run(x_adv, x, grad, length, bounds);
      x_adv += args_.x_adv_strides.row;
      x += args_.x_strides.row;
      grad += args_.grad_strides.row;
    }
  }

  void elements(int64_t sample, const Patch& patch) const {
    for (int64_t c = 0; c < args_.geometry.channels; ++c) {
      for (int64_t h = patch.top; h < patch.bottom; ++h) {
        for (int64_t w = patch.left; w < patch.right; ++w) {
          T* target = x_adv_ + offset(args_.x_adv_strides, sample, c, h, w);
          const float x = to_float(x_[offset(args_.x_strides, sample, c, h, w)]);
          const float grad = to_float(grad_[offset(args_.grad_strides, sample, c, h, w)]);
          store(target, pgd_step(to_float(*target), x, grad, of_channel_[c]));
        }
      }
    }
  }

  const MaskedPgdStepArgs& args_;
  T* x_adv_;
  const T* x_;
  const T* grad_;
  bool columns_;  // columns are next to each other in all three tensors
  bool pixels_;   // channels are, and then columns
  std::vector<PgdBounds> of_channel_;
  std::vector<float> table_;  // [4, W * C], where channels are next to each other
};

template <class T>
void step_all(const MaskedPgdStepArgs& args) {
  const Step<T> step(args);
  const PatchGeometry& g = args.geometry;
  const int64_t height = g.radius < 0 ? g.height : std::min(g.height, 2 * g.radius + 1);
  const int64_t width = g.radius < 0 ? g.width : std::min(g.width, 2 * g.radius + 1);
  const int64_t band = std::max<int64_t>(1, kBand / std::max<int64_t>(1, width * g.channels));
  const int64_t bands = (height + band - 1) / band;
  const int64_t bytes = 4 * g.samples * g.channels * height * width * static_cast<int64_t>(sizeof(T));
  parallel_chunks(g.samples * bands, bytes, [&](int64_t chunk) {
    const int64_t sample = chunk / bands;
    Patch patch = patch_of(g, sample);
    patch.top += chunk % bands * band;
    patch.bottom = std::min(patch.bottom, patch.top + band);
    step.band(sample, patch);
  });
}

}  // namespace

void masked_pgd_step(const MaskedPgdStepArgs& args) {
  switch (args.dtype) {
    case DType::float16:
      return step_all<Float16>(args);
    case DType::bfloat16:
      return step_all<BFloat16>(args);
    default:
      return step_all<float>(args);
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
