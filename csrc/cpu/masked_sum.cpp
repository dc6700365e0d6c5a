// masked_sum on the CPU: one pass where PyTorch takes two.
//
// Computes   what masked_sum.h states.
// A chunk    owns 16,384 elements.
// Moves      reads y and the gradients, writes as much as one of them.
// Accumulates nothing.
#include "masked_sum.h"

#include <algorithm>

#include "huge_pages.h"
#include "parallel.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

constexpr int64_t kChunk = 16384;

template <class T>
void masked(const MaskedSum& args) {
  const T *y = static_cast<const T*>(args.y), *first = static_cast<const T*>(args.first);
  const T* second = static_cast<const T*>(args.second);
  T* out = static_cast<T*>(args.out);
  const int64_t bytes = args.numel * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(out, bytes);
  parallel_chunks((args.numel + kChunk - 1) / kChunk, 3 * bytes, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(args.numel, begin + kChunk);
    // The sum is read whether it is masked or not, so that nothing branches.
    const auto run = [&](const auto& sum) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const float grad = sum(i);
        store(out + i, to_float(y[i]) <= 0.0f ? 0.0f : grad);
      }
    };
    if (second == nullptr) return run([&](int64_t i) { return to_float(first[i]); });
    run([&](int64_t i) { return to_float(first[i]) + to_float(second[i]); });
  });
}

}  // namespace

void masked_sum(const MaskedSum& args) {
  if (args.dtype == DType::float32) return masked<float>(args);
  if (args.dtype == DType::bfloat16) return masked<BFloat16>(args);
  masked<Float16>(args);
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
