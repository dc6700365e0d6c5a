// masked_random_start on the GPU: one launch, on top of a copy of the images.
#include <algorithm>
#include <cstdint>

#include "cuda_api.h"
#include "cuda_launch.h"
#include "masked_random_start.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr const char* kOp = "masked_random_start";
constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1 << 30;

// Computes the noise stated in masked_random_start.h, on top of x.
// A block owns every blocks_of_image-th run of kThreads quads of one image's patch.
// Reads and writes x_adv inside the patch.
// Accumulates nothing; adds in float64.
template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_random_start_kernel(const __grid_constant__ MaskedRandomStartArgs a, unsigned blocks_of_image) {
  const PatchGeometry& g = a.geometry;
  for (int64_t block = blockIdx.x; block < g.samples * blocks_of_image; block += gridDim.x) {
    const int64_t sample = block / blocks_of_image;
    const Patch patch = patch_of(g, sample);
    if (patch.left == patch.right) continue;
    const unsigned rows = static_cast<unsigned>(patch.bottom - patch.top);
    const unsigned first = static_cast<unsigned>(patch.left) / 4;
    const unsigned quads = (static_cast<unsigned>(patch.right) - 1) / 4 + 1 - first;
    const unsigned items = static_cast<unsigned>(g.channels) * rows * quads;
    const auto id = static_cast<uint64_t>(a.ids[sample]);
    const unsigned start = static_cast<unsigned>(block % blocks_of_image) * kThreads + threadIdx.x;
    for (unsigned i = start; i < items; i += blocks_of_image * kThreads) {
      const unsigned line = i / quads, quad = first + i % quads;
      const int64_t channel = line / rows, row = patch.top + line % rows;
      const NoiseBounds bounds = noise_of_channel(a, channel);
      const uint64_t counter = static_cast<uint64_t>((channel * g.height + row) * quads_of_row(g.width) + quad);
      const PhiloxWords random = philox4x32(a.key, id, counter);
      T* pixels =
          static_cast<T*>(a.x_adv) + sample * a.strides.sample + channel * a.strides.channel + row * a.strides.row;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t column = 4 * static_cast<int64_t>(quad) + j;
        if (column < patch.left || column >= patch.right) continue;
        T* target = pixels + column * a.strides.column;
        store(target, with_noise(to_float(*target), random.word[j], bounds));
      }
    }
  }
}

template <class T>
void launch(const MaskedRandomStartArgs& a, cudaStream_t queue) {
  const PatchGeometry& g = a.geometry;
  const int64_t side = g.radius < 0 ? std::max(g.height, g.width) : 2 * g.radius + 1;
  const int64_t items = g.channels * std::min(g.height, side) * (std::min(g.width, side) / 4 + 2);
  const int64_t of_image = (items + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(std::min(kMaxBlocks, g.samples * of_image));
  BDFAST_LAUNCH(masked_random_start_kernel<T>, blocks, kThreads, queue, a, static_cast<unsigned>(of_image));
  check_cuda(cudaGetLastError(), kOp, "masked_random_start_kernel");
}

}  // namespace
}  // namespace BDFAST_ISA_NAMESPACE

using namespace BDFAST_ISA_NAMESPACE;

void masked_random_start_cuda(const MaskedRandomStartArgs& args, void* stream) {
  const PatchGeometry& g = args.geometry;
  if (g.samples * g.channels * g.height * g.width == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case DType::float16:
      return launch<Float16>(args, queue);
    case DType::bfloat16:
      return launch<BFloat16>(args, queue);
    default:
      return launch<float>(args, queue);
  }
}

}  // namespace bdfast
