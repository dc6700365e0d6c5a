// masked_random_start on the GPU: one launch, from the images where patches are whole images, else on top of a copy.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_api.h"
#include "cuda_launch.h"
#include "masked_random_start.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr const char* kOp = "masked_random_start";
constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1 << 30;
constexpr int64_t kManyBlocks = 4096;  // with more of them a thread has kQuadsOfThread quads of its image
constexpr int64_t kQuadsOfThread = 8;

template <class T>
struct Quad {
  using Bits = std::conditional_t<sizeof(T) == 4, float4, uint64_t>;  // what one access moves
  T value[4];
};

template <class T>
__device__ __forceinline__ void load_quad(Quad<T>& quad, const T* p) {
  const auto bits = *reinterpret_cast<const typename Quad<T>::Bits*>(p);
  static_assert(sizeof bits == sizeof quad, "one access");
  memcpy(&quad, &bits, sizeof bits);
}

template <class T>
__device__ __forceinline__ void store_quad(T* p, const Quad<T>& quad) {
  if constexpr (sizeof(T) == 4) {  // from an assignment the compiler makes four stores
    const float4 bits = {quad.value[0], quad.value[1], quad.value[2], quad.value[3]};
    __stwb(reinterpret_cast<float4*>(p), bits);
  } else {
    uint64_t bits;
    memcpy(&bits, &quad, sizeof bits);
    *reinterpret_cast<uint64_t*>(p) = bits;
  }
}

// Where a thread is in its image's patch, a line being a row of a channel. Steps are all of the same length, so that
// dividing once is enough.
struct Position {
  unsigned quad, row, channel;
};

__device__ __forceinline__ Position position_of(unsigned item, unsigned quads, unsigned rows) {
  const unsigned line = item / quads;
  return {item % quads, line % rows, line / rows};
}

__device__ __forceinline__ void advance(Position& at, const Position& step, unsigned quads, unsigned rows) {
  at.quad += step.quad;
  at.row += step.row;
  at.channel += step.channel;
  if (at.quad >= quads) at.quad -= quads, ++at.row;
  if (at.row >= rows) at.row -= rows, ++at.channel;
}

// with_noise, to the bit: the random integer k of u = 2^-23 k is a float64's last bits and `step` is 2^-23 eps, so that
// the product is the same number, and neither u nor eps has to be converted, which is slow.
__device__ __forceinline__ float with_steps(float x, uint32_t word, double step, const NoiseBounds& b) {
  const uint64_t bits = 0x4330000000000000ull | (word >> 8);  // 2^52 + (word >> 8)
  double k;
  memcpy(&k, &bits, sizeof k);
  k -= 4503599635759104.0;  // 2^52 + 2^23
  return clamped(static_cast<float>(static_cast<double>(x) + step * k), b.lower, b.upper);
}

// Where a row begins, where 32 bits tell (see in_quads).
__device__ __forceinline__ unsigned in_image(const ImageStrides& s, unsigned channel, unsigned row) {
  return channel * static_cast<unsigned>(s.channel) + row * static_cast<unsigned>(s.row);
}

// Pixels of a quad in columns left ... right - 1, at whatever strides.
template <class T>
__device__ __forceinline__ void each_pixel(const T* from, T* to, int64_t stride, const Patch& patch, unsigned quad,
                                           const PhiloxWords& random, double step, const NoiseBounds& bounds) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t column = 4 * static_cast<int64_t>(quad) + j;
    if (column < patch.left || column >= patch.right) continue;
    store(to + column * stride, with_steps(to_float(from[column * stride]), random.word[j], step, bounds));
  }
}

// Computes the noise stated in masked_random_start.h, added to x.
// A block owns every blocks_of_image-th run of kThreads quads of the patch of every images_at_once-th image.
// Reads x and writes x_adv inside the patch; with kVector, where quads of a row are next to each other, at once.
// Accumulates nothing; adds in float64.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) masked_random_start_kernel(const __grid_constant__ MaskedRandomStartArgs a,
                                                                       const void* x, unsigned blocks_of_image) {
  const PatchGeometry& g = a.geometry;
  const ImageStrides& s = a.strides;
  const unsigned images_at_once = gridDim.x / blocks_of_image;
  for (int64_t sample = blockIdx.x / blocks_of_image; sample < g.samples; sample += images_at_once) {
    const Patch patch = patch_of(g, sample);
    if (patch.left == patch.right || patch.top == patch.bottom) continue;
    const auto id = static_cast<uint64_t>(a.ids[sample]);
    const unsigned rows = static_cast<unsigned>(patch.bottom - patch.top);
    const unsigned left = static_cast<unsigned>(patch.left), right = static_cast<unsigned>(patch.right);
    const unsigned first = left / 4, quads = (right - 1) / 4 + 1 - first;
    const unsigned items = static_cast<unsigned>(g.channels) * rows * quads;
    const unsigned stride = blocks_of_image * kThreads;
    const Position step = position_of(stride, quads, rows);
    const T* const image = static_cast<const T*>(x) + sample * s.sample;
    T* const target = static_cast<T*>(a.x_adv) + sample * s.sample;
    unsigned i = blockIdx.x % blocks_of_image * kThreads + threadIdx.x;
    for (Position at = position_of(i, quads, rows); i < items; i += stride, advance(at, step, quads, rows)) {
      const NoiseBounds bounds = noise_of_channel(a, at.channel);
      const double noise_step = static_cast<double>(bounds.eps) * 1.1920928955078125e-07;
      const unsigned row = static_cast<unsigned>(patch.top) + at.row, quad = first + at.quad;
      const unsigned line = at.channel * static_cast<unsigned>(g.height) + row;
      const uint64_t counter = line * static_cast<unsigned>(quads_of_row(g.width)) + quad;  // fewer than pixels
      const int64_t offset = kVector ? in_image(s, at.channel, row) : at.channel * s.channel + row * s.row;
      const bool whole = kVector && 4 * quad >= left && 4 * quad + 4 <= right;
      Quad<T> pixels;
      if (whole) load_quad(pixels, image + offset + 4 * quad);
      const PhiloxWords random = philox4x32(a.key, id, counter);
      if (whole) {
        Quad<T> noisy;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          store(&noisy.value[j], with_steps(to_float(pixels.value[j]), random.word[j], noise_step, bounds));
        }
        store_quad(target + offset + 4 * quad, noisy);
      } else {
        each_pixel(image + offset, target + offset, s.column, patch, quad, random, noise_step, bounds);
      }
    }
  }
}

// Whether quads begin at multiples of their size, and 32 bits tell the place of one in its image.
template <class T>
bool in_quads(const MaskedRandomStartArgs& a, const void* x) {
  const PatchGeometry& g = a.geometry;
  const ImageStrides& s = a.strides;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0; };
  return s.column == 1 && s.row % 4 == 0 && s.channel % 4 == 0 && s.sample % 4 == 0 && aligned(x) && aligned(a.x_adv) &&
         s.channel * (g.channels - 1) + s.row * (g.height - 1) + g.width < int64_t{1} << 31;
}

template <class T>
void launch(const MaskedRandomStartArgs& a, const void* x, cudaStream_t queue) {
  const PatchGeometry& g = a.geometry;
  const int64_t side = g.radius < 0 ? std::max(g.height, g.width) : 2 * g.radius + 1;
  const int64_t items = g.channels * std::min(g.height, side) * (std::min(g.width, side) / 4 + 2);
  const int64_t most = (items + kThreads - 1) / kThreads;
  const int64_t fewest = (most + kQuadsOfThread - 1) / kQuadsOfThread;
  const int64_t of_image = std::min(most, std::max(fewest, (kManyBlocks + g.samples - 1) / g.samples));
  const int64_t images_at_once = std::min(g.samples, std::max<int64_t>(1, kMaxBlocks / of_image));
  auto* const kernel = in_quads<T>(a, x) ? masked_random_start_kernel<T, true> : masked_random_start_kernel<T, false>;
  BDFAST_LAUNCH(kernel, static_cast<int>(of_image * images_at_once), kThreads, queue, a, x,
                static_cast<unsigned>(of_image));
  check_cuda(cudaGetLastError(), kOp, "masked_random_start_kernel");
}

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

void masked_random_start_cuda(const MaskedRandomStartArgs& args, const void* x, void* stream) {
  const PatchGeometry& g = args.geometry;
  if (g.samples * g.channels * g.height * g.width == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::float16:
      return launch<Float16>(args, x, queue);
    case DType::bfloat16:
      return launch<BFloat16>(args, x, queue);
    default:
      return launch<float>(args, x, queue);
  }
}

}  // namespace bdfast
