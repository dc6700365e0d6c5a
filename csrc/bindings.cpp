// The Python module bdfast._C: raw pointers, sizes and a stream in, nothing of torch.
//
// Python (bdfast/ops) owns schemas, checks and allocation; what arrives here is already validated. Each op's part is in
// bindings/bind_<op>.h. They are headers of this one file, since pybind11's own take seconds to compile every time.
#ifdef BDFAST_X86_ISAS
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "bindings/bind_batch_norm_clipped_relu.h"
#include "bindings/bind_batch_norm_relu.h"
#include "bindings/bind_batch_norm_stat_distance.h"
#include "bindings/bind_bounded_ascent_cross_entropy.h"
#include "bindings/bind_clipped_relu.h"
#include "bindings/bind_hinge_cross_entropy.h"
#include "bindings/bind_histogram_entropy.h"
#include "bindings/bind_kl_divergence.h"
#include "bindings/bind_linear_sce_margin.h"
#include "bindings/bind_masked_pgd_step.h"
#include "bindings/bind_masked_random_start.h"
#include "bindings/bind_masked_sum.h"
#include "bindings/bind_patch_centers.h"
#include "bindings/bind_philox.h"
#include "bindings/bind_projected_sgd_step.h"
#include "bindings/bind_scale_to_ball.h"
#include "bindings/bind_sce_loss.h"
#include "bindings/bind_sce_margin.h"
#include "bindings/bind_smallest_per_class.h"
#include "bindings/bind_winograd_conv.h"
#include "isa.h"

namespace bdfast {

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

#ifdef BDFAST_X86_ISAS
static bool has_f16c() {  // asked of the processor: "f16c" is an error to __builtin_cpu_supports of clang 14
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

static Isa detect_isa() {
#ifdef BDFAST_X86_ISAS
  const char* cap = std::getenv("BDFAST_ISA_MAX");
  const bool only_baseline = cap != nullptr && std::strcmp(cap, "baseline") == 0;
  const bool at_most_avx2 = cap != nullptr && std::strcmp(cap, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (only_baseline || !avx2) return Isa::baseline;
  return avx512 && !at_most_avx2 ? Isa::avx512 : Isa::avx2;
#else
  return Isa::baseline;
#endif
}

Isa best_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace bdfast

#ifndef BDFAST_BUILD_INFO
#define BDFAST_BUILD_INFO ""
#endif
#ifndef BDFAST_VERSION
#define BDFAST_VERSION "unknown"
#endif

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace bdfast;
  m.doc() = "Compiled kernels of bdfast.";
  m.attr("version") = BDFAST_VERSION;
  m.attr("build_info") = BDFAST_BUILD_INFO;
  m.attr("cpu_isa") = isa_name(best_isa());
#ifdef _OPENMP
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
  bind_batch_norm_clipped_relu(m);
  bind_batch_norm_relu(m);
  bind_batch_norm_stat_distance(m);
  bind_bounded_ascent_cross_entropy(m);
  bind_clipped_relu(m);
  bind_hinge_cross_entropy(m);
  bind_histogram_entropy(m);
  bind_kl_divergence(m);
  bind_linear_sce_margin(m);
  bind_masked_pgd_step(m);
  bind_masked_random_start(m);
  bind_masked_sum(m);
  bind_patch_centers(m);
  bind_philox(m);
  bind_projected_sgd_step(m);
  bind_scale_to_ball(m);
  bind_sce_loss(m);
  bind_sce_margin(m);
  bind_smallest_per_class(m);
  bind_winograd_conv(m);
#ifdef BDFAST_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
