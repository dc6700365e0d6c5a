// csrc/cuda/smallest_per_class.cu as a C library.
#include "../../csrc/cuda/smallest_per_class.cu"

extern "C" const char* select_smallest(const float* scores, const int64_t* labels, int64_t count, int64_t k,
                                       int64_t classes, int reverse_blocks, int64_t* indices, int64_t* counts) {
  cuda_on_cpu::reverse_blocks = reverse_blocks != 0;
  std::vector<uint64_t> keys(static_cast<size_t>(count), ~uint64_t{0});
  std::vector<unsigned> sizes(static_cast<size_t>(classes)), starts(sizes), next(sizes);
  unsigned done = 0;
  return cuda_on_cpu::message_of([&] {
    bdfast::smallest_per_class_cuda({scores, labels, count, k, classes},
                                    {keys.data(), sizes.data(), &done, starts.data(), next.data()}, indices, counts,
                                    nullptr);
  });
}
