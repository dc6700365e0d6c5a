// csrc/cuda/patch_centers.cu as a C library.
#include "../../csrc/cuda/patch_centers.cu"

extern "C" const char* draw(const int64_t* ids, int64_t count, int64_t height, int64_t width, uint64_t key,
                            int32_t* centers) {
  return cuda_on_cpu::message_of(
      [&] { bdfast::patch_centers_cuda({ids, count, height, width, key}, centers, nullptr); });
}
