// csrc/cuda/histogram_entropy.cu as a C library.
#include "../../csrc/cuda/histogram_entropy.cu"

extern "C" const char* entropies(const float* x, int64_t rows, int64_t columns, double step, int strict, float* parts,
                                 float* entropy) {
  const bdfast::HistogramEntropyArgs args = {x, bdfast::DType::float32, rows, columns, nullptr, step, strict != 0};
  return cuda_on_cpu::message_of([&] { bdfast::histogram_entropy_cuda(args, parts, entropy, nullptr); });
}
