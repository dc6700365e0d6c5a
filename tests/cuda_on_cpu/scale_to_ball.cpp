// csrc/cuda/scale_to_ball.cu as a C library.
#include "../../csrc/cuda/scale_to_ball.cu"

extern "C" const char* scale(void* perturbation, int dtype, int64_t images, int64_t numel, double radius,
                             const float* radii, int one_norm, int64_t parts, double* partials) {
  const bdfast::ScaleToBallArgs args = {perturbation, static_cast<bdfast::DType>(dtype), images, numel, radius, radii,
                                        one_norm != 0};
  return cuda_on_cpu::message_of([&] { bdfast::scale_to_ball_cuda(args, parts, partials, nullptr); });
}
