// csrc/cuda/masked_random_start.cu as a C library.
#include "../../csrc/cuda/masked_random_start.cu"

// values and tables: eps, lower, upper.
extern "C" const char* start(void* x_adv, const void* x, int dtype, const int64_t* shape, const int64_t* strides,
                             int64_t radius, const void* centers, int wide, const int64_t* center_strides,
                             const int64_t* ids, uint64_t key, const float* values, const float** tables) {
  const auto bound = [&](int which) { return bdfast::ChannelValue{values[which], tables[which]}; };
  const bdfast::PatchGeometry geometry = {shape[0], shape[1],  shape[2],          shape[3],         radius,
                                          centers,  wide != 0, center_strides[0], center_strides[1]};
  const bdfast::MaskedRandomStartArgs args = {x_adv,
                                              static_cast<bdfast::DType>(dtype),
                                              {strides[0], strides[1], strides[2], strides[3]},
                                              geometry,
                                              ids,
                                              key,
                                              bound(0),
                                              bound(1),
                                              bound(2)};
  return cuda_on_cpu::message_of([&] { bdfast::masked_random_start_cuda(args, x, nullptr); });
}
