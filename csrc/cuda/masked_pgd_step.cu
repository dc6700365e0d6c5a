// masked_pgd_step_ on the GPU: one launch, which touches the patches alone.
//
// Where rows start at multiples of 16 bytes in all three tensors, a thread takes the 16 bytes around its part of a row:
// at the two ends of a patch it loads what lies beside the patch as well, and stores elements one by one. Rows are those
// of one channel (contiguous images) or of pixels with their channels (channels_last); all else goes element by element.
#include <algorithm>
#include <cstdint>

#include "cuda_api.h"
#include "cuda_launch.h"
#include "cuda_vector.cuh"
#include "masked_pgd_step.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr const char* kOp = "masked_pgd_step_";
constexpr int kThreads = 128;  // a CIFAR-10 patch of half-width 8 is 306 vectors
constexpr int64_t kMaxBlocks = 1 << 30;

__device__ __forceinline__ int64_t offset(const ImageStrides& s, int64_t sample, int64_t channel, int64_t row,
                                          int64_t column) {
  return sample * s.sample + channel * s.channel + row * s.row + column * s.column;
}

// Computes the step stated in masked_pgd_step.h.
// A block owns every blocks_of_image-th run of kThreads vectors of one image's patch.
// Reads x_adv, x, grad and writes x_adv inside the patch; reads up to a vector more at its left and right.
// Accumulates nothing; computes in float32.
template <class T, int kVector, bool kPixels>
__global__ void __launch_bounds__(kThreads)
    masked_pgd_step_kernel(const __grid_constant__ MaskedPgdStepArgs a, unsigned blocks_of_image) {
  const bool by_channel = a.step_size.of_channel != nullptr || a.eps.of_channel != nullptr ||
                          a.lower.of_channel != nullptr || a.upper.of_channel != nullptr;
  const unsigned channels = static_cast<unsigned>(a.geometry.channels);
  const PgdBounds of_all = by_channel ? PgdBounds{} : bounds_of_channel(a, 0);
  for (int64_t block = blockIdx.x; block < a.geometry.samples * blocks_of_image; block += gridDim.x) {
    const int64_t sample = block / blocks_of_image;
    const Patch patch = patch_of(a.geometry, sample);
    const unsigned rows = static_cast<unsigned>(patch.bottom - patch.top);
    const unsigned begin = static_cast<unsigned>(patch.left) * (kPixels ? channels : 1);  // in a row
    const unsigned end = static_cast<unsigned>(patch.right) * (kPixels ? channels : 1);
    if (begin == end) continue;
    const unsigned first = begin / kVector;
    const unsigned vectors = (end - 1) / kVector + 1 - first;
    const unsigned items = (kPixels ? 1 : channels) * rows * vectors;
    const unsigned start = static_cast<unsigned>(block % blocks_of_image) * kThreads + threadIdx.x;
    for (unsigned i = start; i < items; i += blocks_of_image * kThreads) {
      const unsigned line = i / vectors;
      const unsigned element = (first + i % vectors) * kVector;  // of the row
      const int64_t row = patch.top + (kPixels ? line : line % rows);
      unsigned channel = kPixels ? element % channels : line / rows;
      // A vector of pixels starts at any channel; its address counts from the first channel of the row.
      const bool whole_row = kPixels && kVector > 1;
      const int64_t of_address = whole_row ? 0 : channel;
      const int64_t column = whole_row ? 0 : kPixels ? element / channels : element;
      const int64_t past = whole_row ? element : 0;
      T* target = static_cast<T*>(a.x_adv) + offset(a.x_adv_strides, sample, of_address, row, column) + past;
      auto x_adv = load_values<T, kVector>(target);
      const auto x = load_values<T, kVector>(static_cast<const T*>(a.x) +
                                             offset(a.x_strides, sample, of_address, row, column) + past);
      const auto grad = load_values<T, kVector>(static_cast<const T*>(a.grad) +
                                                offset(a.grad_strides, sample, of_address, row, column) + past);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const PgdBounds bounds = by_channel ? bounds_of_channel(a, channel) : of_all;
        store(&x_adv.value[v],
              pgd_step(to_float(x_adv.value[v]), to_float(x.value[v]), to_float(grad.value[v]), bounds));
        if (kPixels) channel = channel + 1 == channels ? 0 : channel + 1;
      }
      if (element >= begin && element + kVector <= end) {
        store_values(target, x_adv);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (element + v >= begin && element + v < end) target[v] = x_adv.value[v];
        }
      }
    }
  }
}

// --- host ------------------------------------------------------------------------------------------------------------

struct View {
  const void* data;
  const ImageStrides& strides;
};

// Whether every row starts at a multiple of `vector` elements, and ends at one.
bool in_vectors(const View& view, const PatchGeometry& g, int64_t vector, bool pixels) {
  const ImageStrides& s = view.strides;
  const bool dense = pixels ? s.channel == 1 && s.column == g.channels : s.column == 1 && s.channel % vector == 0;
  const int64_t length = pixels ? g.width * g.channels : g.width;
  return dense && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && s.sample % vector == 0 && s.row % vector == 0 &&
         length % vector == 0;
}

template <class T, int kVector, bool kPixels>
void launch(const MaskedPgdStepArgs& a, cudaStream_t queue) {
  const PatchGeometry& g = a.geometry;
  const int64_t side = g.radius < 0 ? std::max(g.height, g.width) : 2 * g.radius + 1;
  const int64_t rows = std::min(g.height, side) * (kPixels ? 1 : g.channels);
  const int64_t length = std::min(g.width, side) * (kPixels ? g.channels : 1);
  const int64_t items = rows * (kVector == 1 ? length : length / kVector + 2);
  const int64_t of_image = (items + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(std::min(kMaxBlocks, g.samples * of_image));
  auto* const kernel = masked_pgd_step_kernel<T, kVector, kPixels>;
  BDFAST_LAUNCH(kernel, blocks, kThreads, queue, a, static_cast<unsigned>(of_image));
  check_cuda(cudaGetLastError(), kOp, "masked_pgd_step_kernel");
}

template <class T>
void choose(const MaskedPgdStepArgs& a, cudaStream_t queue) {
  constexpr int kVector = 16 / sizeof(T);
  const View views[] = {{a.x_adv, a.x_adv_strides}, {a.x, a.x_strides}, {a.grad, a.grad_strides}};
  const auto all = [&](bool pixels) {
    return std::all_of(views, views + 3, [&](const View& v) { return in_vectors(v, a.geometry, kVector, pixels); });
  };
  if (all(false)) return launch<T, kVector, false>(a, queue);
  if (all(true)) return launch<T, kVector, true>(a, queue);
  if (a.x_adv_strides.channel < a.x_adv_strides.column) return launch<T, 1, true>(a, queue);
  launch<T, 1, false>(a, queue);
}

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

void masked_pgd_step_cuda(const MaskedPgdStepArgs& args, void* stream) {
  const PatchGeometry& g = args.geometry;
  if (g.samples * g.channels * g.height * g.width == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::float16:
      return choose<Float16>(args, queue);
    case DType::bfloat16:
      return choose<BFloat16>(args, queue);
    default:
      return choose<float>(args, queue);
  }
}

}  // namespace bdfast
