// csrc/cuda/projected_sgd_step.cu as a C library.
#include "../../csrc/cuda/projected_sgd_step.cu"

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
  return cuda_on_cpu::message_of([&] {
    bdfast::projected_sgd_step_cuda(segments.data(), count, {lr, momentum, distance_weight}, lr_pointer, norms,
                                    distances, scratch, nullptr);
  });
}
}
