// csrc/cuda/masked_pgd_step.cu as a C library.
#include "../../csrc/cuda/masked_pgd_step.cu"

// `images`: x_adv, x, grad, whose strides follow each other in `strides`; values and tables: step_size, eps, lower, upper.
extern "C" const char* step(void** images, int dtype, const int64_t* shape, const int64_t* strides, int64_t radius,
                            const void* centers, int wide, const int64_t* center_strides, const float* values,
                            const float** tables, int reverse_blocks) {
  cuda_on_cpu::reverse_blocks = reverse_blocks != 0;
  const auto of = [&](int image) {
    const int64_t* s = strides + 4 * image;
    return bdfast::ImageStrides{s[0], s[1], s[2], s[3]};
  };
  const auto bound = [&](int which) { return bdfast::ChannelValue{values[which], tables[which]}; };
  const bdfast::PatchGeometry geometry = {shape[0], shape[1],  shape[2],          shape[3],         radius,
                                          centers,  wide != 0, center_strides[0], center_strides[1]};
  const bdfast::MaskedPgdStepArgs args = {images[0], images[1], images[2], static_cast<bdfast::DType>(dtype),
                                          of(0),     of(1),     of(2),     geometry,
                                          bound(0),  bound(1),  bound(2),  bound(3)};
  return cuda_on_cpu::message_of([&] { bdfast::masked_pgd_step_cuda(args, nullptr); });
}
