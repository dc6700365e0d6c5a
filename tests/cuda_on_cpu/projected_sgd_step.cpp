// csrc/cuda/projected_sgd_step.cu as a C library, and kernels with planted faults that the runner has to report.
#include "../../csrc/cuda/projected_sgd_step.cu"

namespace {

__global__ void barrier_for_some(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void shuffle_for_some(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 1);
}

__global__ void two_barriers(int* out) {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <class Call>
const char* message_of(const Call& call) {
  static std::string message;
  message.clear();
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

void set_machine(int multiprocessors, int reverse_blocks) {
  cuda_on_cpu::multiprocessors = multiprocessors;
  cuda_on_cpu::reverse_blocks = reverse_blocks != 0;
}

int64_t scratch_doubles(const int64_t* numels, int64_t count) {
  return bdfast::projected_sgd_step_scratch(numels, count);
}

const char* step(float** weights, const float** anchors, const float** grads, float** momentum_buffers,
                 const int64_t* numels, int64_t count, float lr, const float* lr_pointer, float momentum,
                 float distance_weight, const float* norms, float* distances, double* scratch) {
  std::vector<bdfast::ProjectedSgdSegment> segments;
  for (int64_t j = 0; j < count; ++j) {
    segments.push_back({weights[j], anchors[j], grads[j], momentum_buffers[j], numels[j]});
  }
  return message_of([&] {
    bdfast::projected_sgd_step_cuda(segments.data(), count, {lr, momentum, distance_weight}, lr_pointer, norms, distances,
                                    scratch, nullptr);
  });
}

const char* planted_fault(int which) {
  int out[64] = {};
  return message_of([&] {
    if (which == 0) BDFAST_LAUNCH(barrier_for_some, 1, 64, nullptr, out);
    if (which == 1) BDFAST_LAUNCH(shuffle_for_some, 1, 64, nullptr, out);
    if (which == 2) BDFAST_LAUNCH(two_barriers, 1, 64, nullptr, out);
    bdfast::check_cuda(cudaGetLastError(), "planted_fault", "launch");
  });
}
}
