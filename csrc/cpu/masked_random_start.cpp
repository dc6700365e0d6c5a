// masked_random_start on the CPU.
//
// Computes   the noise stated in masked_random_start.h, on top of x.
// A chunk    owns the patch of one image, sixteen quads of a channel at a time.
// Moves      reads and writes x_adv inside the patch.
// Accumulates nothing.
#include "masked_random_start.h"

#include <algorithm>

#include "parallel.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int kQuads = 16;

struct Quad {
  int64_t row, column;  // of its first pixel
};

template <class T>
class Start {
 public:
  explicit Start(const MaskedRandomStartArgs& args) : args_(args), x_adv_(static_cast<T*>(args.x_adv)) {}

  void sample(int64_t sample) const {
    const PatchGeometry& g = args_.geometry;
    const Patch patch = patch_of(g, sample);
    if (patch.right == patch.left) return;
    const int64_t first = patch.left / 4, quads = (patch.right - 1) / 4 + 1 - first;
    const int64_t total = (patch.bottom - patch.top) * quads;
    for (int64_t c = 0; c < g.channels; ++c) {
      const NoiseBounds bounds = noise_of_channel(args_, c);
      T* image = x_adv_ + sample * args_.strides.sample + c * args_.strides.channel;
      for (int64_t begin = 0; begin < total; begin += kQuads) {
        const int count = static_cast<int>(std::min<int64_t>(kQuads, total - begin));
        Quad at[kQuads] = {};
        for (int q = 0; q < count; ++q) at[q] = {patch.top + (begin + q) / quads, 4 * (first + (begin + q) % quads)};
        uint32_t words[4][kQuads];
        draw(args_.ids[sample], c, at, words);
        for (int q = 0; q < count; ++q) write(image, at[q], patch, words, q, bounds);
      }
    }
  }

 private:
  void draw(int64_t id, int64_t channel, const Quad (&at)[kQuads], uint32_t (&words)[4][kQuads]) const {
    const PatchGeometry& g = args_.geometry;
    uint64_t counter[kQuads];
    for (int q = 0; q < kQuads; ++q)
      counter[q] = static_cast<uint64_t>((channel * g.height + at[q].row) * quads_of_row(g.width) + at[q].column / 4);
    for (int q = 0; q < kQuads; ++q) {
      const PhiloxWords random = philox4x32(args_.key, static_cast<uint64_t>(id), counter[q]);
      for (int j = 0; j < 4; ++j) words[j][q] = random.word[j];
    }
  }

  void write(T* image, const Quad& at, const Patch& patch, const uint32_t (&words)[4][kQuads], int q,
             const NoiseBounds& bounds) const {
    T* row = image + at.row * args_.strides.row;
    for (int j = 0; j < 4; ++j) {
      const int64_t column = at.column + j;
      if (column < patch.left || column >= patch.right) continue;
      T* target = row + column * args_.strides.column;
      store(target, with_noise(to_float(*target), words[j][q], bounds));
    }
  }

  const MaskedRandomStartArgs& args_;
  T* x_adv_;
};

template <class T>
void start_all(const MaskedRandomStartArgs& args) {
  const Start<T> start(args);
  const PatchGeometry& g = args.geometry;
  const int64_t side = g.radius < 0 ? g.height : std::min(g.height, 2 * g.radius + 1);
  // An element costs what moving sixteen bytes does.
  parallel_chunks(g.samples, 16 * g.samples * g.channels * side * side, [&](int64_t sample) { start.sample(sample); });
}

}  // namespace

void masked_random_start(const MaskedRandomStartArgs& args) {
  switch (args.dtype) {
    case DType::float16:
      return start_all<Float16>(args);
    case DType::bfloat16:
      return start_all<BFloat16>(args);
    default:
      return start_all<float>(args);
  }
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
