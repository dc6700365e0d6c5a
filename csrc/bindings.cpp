// The Python module bdfast._C: raw pointers, sizes and a stream in, nothing of torch.
//
// Python (bdfast/ops) owns schemas, checks and allocation; what arrives here is already validated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "batch_norm_clipped_relu.h"
#include "batch_norm_stat_distance.h"
#include "bounded_ascent_cross_entropy.h"
#include "clipped_relu.h"
#include "hinge_cross_entropy.h"
#include "histogram_entropy.h"
#include "isa.h"
#include "kl_divergence.h"
#include "linear_sce_margin.h"
#include "masked_pgd_step.h"
#include "masked_random_start.h"
#include "patch_centers.h"
#include "projected_sgd_step.h"
#include "scale_to_ball.h"
#include "sce_loss.h"
#include "sce_margin.h"
#include "smallest_per_class.h"

#ifdef BDFAST_WITH_CUDA
#include "cuda_api.h"
#endif

namespace py = pybind11;

namespace bdfast {

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

static Isa detect_isa() {
#ifdef BDFAST_X86_ISAS
  const char* cap = std::getenv("BDFAST_ISA_MAX");
  const bool only_baseline = cap != nullptr && std::strcmp(cap, "baseline") == 0;
  const bool at_most_avx2 = cap != nullptr && std::strcmp(cap, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

LabelledRows labelled_rows(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                           uintptr_t target) {
  return {pointer<const void>(logits),   static_cast<DType>(dtype), rows, classes, row_stride,
          pointer<const int64_t>(target)};
}

int64_t hinge_cross_entropy_fwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                uintptr_t target, float margin, bool batch_hinge, int reduction, uintptr_t loss,
                                uintptr_t stats, uintptr_t grad_logits) {
  const HingeCrossEntropyArgs args{labelled_rows(logits, dtype, rows, classes, row_stride, target), margin,
                                   batch_hinge};
  return BDFAST_CALL_BEST(hinge_cross_entropy_fwd, args, static_cast<Reduction>(reduction), pointer<float>(loss),
                          pointer<float>(stats), pointer<void>(grad_logits));
}

void hinge_cross_entropy_bwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                             uintptr_t target, float margin, bool batch_hinge, int reduction, uintptr_t grad_loss,
                             uintptr_t loss, uintptr_t stats, uintptr_t grad_logits) {
  const HingeCrossEntropyArgs args{labelled_rows(logits, dtype, rows, classes, row_stride, target), margin,
                                   batch_hinge};
  BDFAST_CALL_BEST(hinge_cross_entropy_bwd, args, static_cast<Reduction>(reduction), pointer<const float>(grad_loss),
                   pointer<const float>(loss), pointer<const float>(stats), pointer<void>(grad_logits));
}

int64_t bounded_ascent_cross_entropy_fwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                         uintptr_t target, int64_t num_descend, double mu, float tau, uintptr_t loss,
                                         uintptr_t stats, uintptr_t grad_logits) {
  const BoundedAscentCrossEntropyArgs args{labelled_rows(logits, dtype, rows, classes, row_stride, target), num_descend,
                                           mu, tau};
  return BDFAST_CALL_BEST(bounded_ascent_cross_entropy_fwd, args, pointer<float>(loss), pointer<float>(stats),
                          pointer<void>(grad_logits));
}

void bounded_ascent_cross_entropy_bwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                      uintptr_t target, int64_t num_descend, double mu, float tau, uintptr_t grad_loss,
                                      uintptr_t stats, uintptr_t grad_logits) {
  const BoundedAscentCrossEntropyArgs args{labelled_rows(logits, dtype, rows, classes, row_stride, target), num_descend,
                                           mu, tau};
  BDFAST_CALL_BEST(bounded_ascent_cross_entropy_bwd, args, pointer<const float>(grad_loss), pointer<const float>(stats),
                   pointer<void>(grad_logits));
}

KlDivergenceArgs kl_args(uintptr_t logits_p, uintptr_t logits_q, int dtype, int64_t rows, int64_t classes,
                         int64_t stride_p, int64_t stride_q) {
  return {pointer<const void>(logits_p),
          pointer<const void>(logits_q),
          static_cast<DType>(dtype),
          rows,
          classes,
          stride_p,
          stride_q};
}

void kl_divergence_fwd(uintptr_t logits_p, uintptr_t logits_q, int dtype, int64_t rows, int64_t classes,
                       int64_t stride_p, int64_t stride_q, int reduction, uintptr_t loss, uintptr_t stats) {
  const auto args = kl_args(logits_p, logits_q, dtype, rows, classes, stride_p, stride_q);
  BDFAST_CALL_BEST(kl_divergence_fwd, args, static_cast<Reduction>(reduction), pointer<float>(loss),
                   pointer<float>(stats));
}

void kl_divergence_bwd(uintptr_t logits_p, uintptr_t logits_q, int dtype, int64_t rows, int64_t classes,
                       int64_t stride_p, int64_t stride_q, int reduction, uintptr_t grad_loss, uintptr_t stats,
                       uintptr_t grad_p, uintptr_t grad_q) {
  const auto args = kl_args(logits_p, logits_q, dtype, rows, classes, stride_p, stride_q);
  BDFAST_CALL_BEST(kl_divergence_bwd, args, static_cast<Reduction>(reduction), pointer<const float>(grad_loss),
                   pointer<const float>(stats), pointer<void>(grad_p), pointer<void>(grad_q));
}

using Layers = std::vector<std::array<uintptr_t, 5>>;  // addresses of W, W0, G and V, and the number of their elements

std::vector<ProjectedSgdSegment> make_segments(const Layers& layers) {
  std::vector<ProjectedSgdSegment> segments;
  segments.reserve(layers.size());
  for (const auto& [weight, anchor, grad, momentum, numel] : layers) {
    segments.push_back({pointer<float>(weight), pointer<const float>(anchor), pointer<const float>(grad),
                        pointer<float>(momentum), static_cast<int64_t>(numel)});
  }
  return segments;
}

void projected_sgd_step(const Layers& layers, float lr, float momentum, float distance_weight, uintptr_t norms,
                        uintptr_t distances) {
  const auto segments = make_segments(layers);
  const ProjectedSgdScalars scalars{lr, momentum, distance_weight};
  BDFAST_CALL_BEST(projected_sgd_step, segments.data(), static_cast<int64_t>(segments.size()), scalars,
                   pointer<const float>(norms), pointer<float>(distances));
}

SceLossArgs sce_loss_args(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                          uintptr_t target, float alpha, float reverse) {
  return {pointer<const void>(logits),
          static_cast<DType>(dtype),
          rows,
          classes,
          row_stride,
          pointer<const int64_t>(target),
          alpha,
          reverse};
}

int64_t sce_loss_fwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t target,
                     float alpha, float reverse, int reduction, uintptr_t loss, uintptr_t stats) {
  const auto args = sce_loss_args(logits, dtype, rows, classes, row_stride, target, alpha, reverse);
  return BDFAST_CALL_BEST(sce_loss_fwd, args, static_cast<Reduction>(reduction), pointer<float>(loss),
                          pointer<float>(stats));
}

void sce_loss_bwd(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t target,
                  float alpha, float reverse, int reduction, uintptr_t grad_loss, uintptr_t stats,
                  uintptr_t grad_logits) {
  const auto args = sce_loss_args(logits, dtype, rows, classes, row_stride, target, alpha, reverse);
  BDFAST_CALL_BEST(sce_loss_bwd, args, static_cast<Reduction>(reduction), pointer<const float>(grad_loss),
                   pointer<const float>(stats), pointer<void>(grad_logits));
}

int64_t sce_margin(uintptr_t logits, int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t target,
                   uintptr_t margin) {
  const SceMarginArgs args{pointer<const void>(logits),   static_cast<DType>(dtype), rows, classes, row_stride,
                           pointer<const int64_t>(target)};
  return BDFAST_CALL_BEST(sce_margin, args, pointer<float>(margin));
}

SceState sce_state(uintptr_t max, uintptr_t sum, uintptr_t label) {
  return {pointer<float>(max), pointer<float>(sum), pointer<float>(label)};
}

void linear_sce_margin_update(uintptr_t logits, int64_t rows, int64_t classes, int64_t first_class, uintptr_t target,
                              uintptr_t max, uintptr_t sum, uintptr_t label) {
  const LogitsTile tile{pointer<const float>(logits), rows, classes, first_class, pointer<const int64_t>(target)};
  BDFAST_CALL_BEST(linear_sce_margin_update, tile, sce_state(max, sum, label));
}

void linear_sce_margin_finish(uintptr_t max, uintptr_t sum, uintptr_t label, int64_t rows, uintptr_t margin) {
  BDFAST_CALL_BEST(linear_sce_margin_finish, sce_state(max, sum, label), rows, pointer<float>(margin));
}

using Four = std::array<int64_t, 4>;

ImageStrides image_strides(const Four& s) { return {s[0], s[1], s[2], s[3]}; }

using Centers = std::tuple<uintptr_t, bool, int64_t, int64_t>;  // address, int64, strides of samples and coordinates
using PerChannel = std::pair<float, uintptr_t>;  // one value, or where there is one for each channel; else 0

PatchGeometry patch_geometry(const Four& shape, int64_t radius, const Centers& c) {
  return {shape[0],       shape[1],       shape[2],      shape[3], radius, pointer<const void>(std::get<0>(c)),
          std::get<1>(c), std::get<2>(c), std::get<3>(c)};
}

ChannelValue channel_value_of(const PerChannel& value) { return {value.first, pointer<const float>(value.second)}; }

MaskedPgdStepArgs masked_pgd_step_args(uintptr_t x_adv, uintptr_t x, uintptr_t grad, int dtype, const Four& shape,
                                       const Four& x_adv_strides, const Four& x_strides, const Four& grad_strides,
                                       int64_t radius, const Centers& centers, const PerChannel& step_size,
                                       const PerChannel& eps, const PerChannel& lower, const PerChannel& upper) {
  return {pointer<void>(x_adv),         pointer<const void>(x),
          pointer<const void>(grad),    static_cast<DType>(dtype),
          image_strides(x_adv_strides), image_strides(x_strides),
          image_strides(grad_strides),  patch_geometry(shape, radius, centers),
          channel_value_of(step_size),  channel_value_of(eps),
          channel_value_of(lower),      channel_value_of(upper)};
}

void masked_pgd_step(uintptr_t x_adv, uintptr_t x, uintptr_t grad, int dtype, const Four& shape,
                     const Four& x_adv_strides, const Four& x_strides, const Four& grad_strides, int64_t radius,
                     const Centers& centers, const PerChannel& step_size, const PerChannel& eps,
                     const PerChannel& lower, const PerChannel& upper) {
  const auto args = masked_pgd_step_args(x_adv, x, grad, dtype, shape, x_adv_strides, x_strides, grad_strides, radius,
                                         centers, step_size, eps, lower, upper);
  BDFAST_CALL_BEST(masked_pgd_step, args);
}

PatchCentersArgs patch_centers_args(uintptr_t ids, int64_t count, int64_t height, int64_t width, uint64_t key) {
  return {pointer<const int64_t>(ids), count, height, width, key};
}

void patch_centers(uintptr_t ids, int64_t count, int64_t height, int64_t width, uint64_t key, uintptr_t centers) {
  BDFAST_CALL_BEST(patch_centers, patch_centers_args(ids, count, height, width, key), pointer<int32_t>(centers));
}

MaskedRandomStartArgs masked_random_start_args(uintptr_t x_adv, int dtype, const Four& shape, const Four& strides,
                                               int64_t radius, const Centers& centers, uintptr_t ids, uint64_t key,
                                               const PerChannel& eps, const PerChannel& lower,
                                               const PerChannel& upper) {
  return {pointer<void>(x_adv),        static_cast<DType>(dtype),
          image_strides(strides),      patch_geometry(shape, radius, centers),
          pointer<const int64_t>(ids), key,
          channel_value_of(eps),       channel_value_of(lower),
          channel_value_of(upper)};
}

void masked_random_start(uintptr_t x_adv, int dtype, const Four& shape, const Four& strides, int64_t radius,
                         const Centers& centers, uintptr_t ids, uint64_t key, const PerChannel& eps,
                         const PerChannel& lower, const PerChannel& upper) {
  const auto args =
      masked_random_start_args(x_adv, dtype, shape, strides, radius, centers, ids, key, eps, lower, upper);
  BDFAST_CALL_BEST(masked_random_start, args);
}

ScaleToBallArgs scale_to_ball_args(uintptr_t perturbation, int dtype, int64_t images, int64_t numel, double radius,
                                   uintptr_t radii, bool one_norm) {
  return {pointer<void>(perturbation),
          static_cast<DType>(dtype),
          images,
          numel,
          radius,
          pointer<const float>(radii),
          one_norm};
}

void scale_to_ball(uintptr_t perturbation, int dtype, int64_t images, int64_t numel, double radius, uintptr_t radii,
                   bool one_norm) {
  BDFAST_CALL_BEST(scale_to_ball, scale_to_ball_args(perturbation, dtype, images, numel, radius, radii, one_norm));
}

BatchNormStatDistanceArgs stat_distance_args(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner,
                                             uintptr_t running_mean, uintptr_t running_var) {
  return {pointer<const void>(x),
          static_cast<DType>(dtype),
          {numel, channels, inner},
          pointer<const float>(running_mean),
          pointer<const float>(running_var)};
}

double batch_norm_stat_distance_fwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner,
                                    uintptr_t running_mean, uintptr_t running_var, uintptr_t stats) {
  const auto args = stat_distance_args(x, dtype, numel, channels, inner, running_mean, running_var);
  return BDFAST_CALL_BEST(batch_norm_stat_distance_fwd, args, pointer<double>(stats));
}

void batch_norm_stat_distance_bwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner,
                                  uintptr_t running_mean, uintptr_t running_var, uintptr_t stats, float grad,
                                  uintptr_t grad_x) {
  const auto args = stat_distance_args(x, dtype, numel, channels, inner, running_mean, running_var);
  BDFAST_CALL_BEST(batch_norm_stat_distance_bwd, args, pointer<const double>(stats), grad, pointer<void>(grad_x));
}

// Words of the generator, for tests against published values.
std::array<uint32_t, 4> philox4x32_words(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  const auto random = isa_baseline::philox4x32(key, counter_low, counter_high);
  return {random.word[0], random.word[1], random.word[2], random.word[3]};
}

#ifdef BDFAST_WITH_CUDA
int64_t projected_sgd_step_scratch_of(const std::vector<int64_t>& numels) {
  return projected_sgd_step_scratch(numels.data(), static_cast<int64_t>(numels.size()));
}

void projected_sgd_step_on_gpu(const Layers& layers, float lr, uintptr_t lr_pointer, float momentum,
                               float distance_weight, uintptr_t norms, uintptr_t distances, uintptr_t scratch,
                               uintptr_t stream) {
  const auto segments = make_segments(layers);
  const ProjectedSgdScalars scalars{lr, momentum, distance_weight};
  projected_sgd_step_cuda(segments.data(), static_cast<int64_t>(segments.size()), scalars,
                          pointer<const float>(lr_pointer), pointer<const float>(norms), pointer<float>(distances),
                          pointer<double>(scratch), pointer<void>(stream));
}

void smallest_per_class_on_gpu(uintptr_t scores, uintptr_t labels, int64_t count, int64_t k, int64_t classes,
                               uintptr_t keys, uintptr_t counters, uintptr_t indices, uintptr_t counts,
                               uintptr_t stream) {
  auto* sizes = pointer<unsigned>(counters);
  smallest_per_class_cuda({pointer<const float>(scores), pointer<const int64_t>(labels), count, k, classes},
                          {pointer<uint64_t>(keys), sizes, sizes + classes, sizes + 2 * classes},
                          pointer<int64_t>(indices), pointer<int64_t>(counts), pointer<void>(stream));
}

void masked_pgd_step_on_gpu(uintptr_t x_adv, uintptr_t x, uintptr_t grad, int dtype, const Four& shape,
                            const Four& x_adv_strides, const Four& x_strides, const Four& grad_strides, int64_t radius,
                            const Centers& centers, const PerChannel& step_size, const PerChannel& eps,
                            const PerChannel& lower, const PerChannel& upper, uintptr_t stream) {
  const auto args = masked_pgd_step_args(x_adv, x, grad, dtype, shape, x_adv_strides, x_strides, grad_strides, radius,
                                         centers, step_size, eps, lower, upper);
  masked_pgd_step_cuda(args, pointer<void>(stream));
}

void patch_centers_on_gpu(uintptr_t ids, int64_t count, int64_t height, int64_t width, uint64_t key, uintptr_t centers,
                          uintptr_t stream) {
  patch_centers_cuda(patch_centers_args(ids, count, height, width, key), pointer<int32_t>(centers),
                     pointer<void>(stream));
}

void masked_random_start_on_gpu(uintptr_t x_adv, int dtype, const Four& shape, const Four& strides, int64_t radius,
                                const Centers& centers, uintptr_t ids, uint64_t key, const PerChannel& eps,
                                const PerChannel& lower, const PerChannel& upper, uintptr_t stream) {
  const auto args =
      masked_random_start_args(x_adv, dtype, shape, strides, radius, centers, ids, key, eps, lower, upper);
  masked_random_start_cuda(args, pointer<void>(stream));
}

void scale_to_ball_on_gpu(uintptr_t perturbation, int dtype, int64_t images, int64_t numel, double radius,
                          uintptr_t radii, bool one_norm, uintptr_t stream) {
  scale_to_ball_cuda(scale_to_ball_args(perturbation, dtype, images, numel, radius, radii, one_norm),
                     pointer<void>(stream));
}

void histogram_entropy_on_gpu(uintptr_t x, int64_t rows, int64_t columns, uintptr_t terms, double step, bool strict,
                              uintptr_t parts, uintptr_t entropy, uintptr_t stream) {
  const HistogramEntropyArgs args{pointer<const void>(x),      DType::float32, rows,  columns,
                                  pointer<const float>(terms), step,           strict};
  histogram_entropy_cuda(args, pointer<float>(parts), pointer<float>(entropy), pointer<void>(stream));
}

void bind_cuda(py::module_& m) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("projected_sgd_step_scratch", &projected_sgd_step_scratch_of, nogil());
  m.def("projected_sgd_step_cuda", &projected_sgd_step_on_gpu, nogil());
  m.def("smallest_per_class_cuda", &smallest_per_class_on_gpu, nogil());
  m.def("masked_pgd_step_cuda", &masked_pgd_step_on_gpu, nogil());
  m.def("patch_centers_cuda", &patch_centers_on_gpu, nogil());
  m.def("scale_to_ball_cuda", &scale_to_ball_on_gpu, nogil());
  m.def("histogram_entropy_cuda", &histogram_entropy_on_gpu, nogil());
  m.def("masked_random_start_cuda", &masked_random_start_on_gpu, nogil());
}
#endif

// `bound` at address 0 stands for the one number `limit`; a gradient that is not wanted has bits at address 0.
void clipped_relu_fwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner, uintptr_t bound,
                      float limit, uintptr_t y, uintptr_t pass, uintptr_t clip) {
  const ClippedReluArgs args{pointer<const void>(x),
                             static_cast<DType>(dtype),
                             {numel, channels, inner},
                             bound != 0 ? pointer<const float>(bound) : &limit};
  BDFAST_CALL_BEST(clipped_relu_fwd, args, pointer<void>(y), pointer<uint32_t>(pass), pointer<uint32_t>(clip));
}

void clipped_relu_bwd(uintptr_t grad, int dtype, int64_t numel, int64_t channels, int64_t inner, uintptr_t scale,
                      uintptr_t pass, uintptr_t clip, int64_t bounds, uintptr_t grad_x, uintptr_t grad_bound) {
  const ClippedReluGradArgs args{pointer<const void>(grad),
                                 static_cast<DType>(dtype),
                                 {numel, channels, inner},
                                 pointer<const float>(scale),
                                 pointer<const uint32_t>(pass),
                                 pointer<const uint32_t>(clip),
                                 bounds};
  BDFAST_CALL_BEST(clipped_relu_bwd, args, pointer<void>(grad_x), pointer<float>(grad_bound));
}

void batch_norm_clipped_relu_fwd(uintptr_t x, int dtype, int64_t numel, int64_t channels, int64_t inner,
                                 uintptr_t running_mean, uintptr_t running_var, uintptr_t weight, uintptr_t bias,
                                 double eps, uintptr_t bound, int64_t bounds, float limit, uintptr_t y, uintptr_t scale,
                                 uintptr_t pass, uintptr_t clip) {
  const BatchNormClippedReluArgs args{pointer<const void>(x),
                                      static_cast<DType>(dtype),
                                      {numel, channels, inner},
                                      pointer<const float>(running_mean),
                                      pointer<const float>(running_var),
                                      pointer<const float>(weight),
                                      pointer<const float>(bias),
                                      eps,
                                      bound != 0 ? pointer<const float>(bound) : &limit,
                                      bound != 0 ? bounds : 1};
  BDFAST_CALL_BEST(batch_norm_clipped_relu_fwd, args, pointer<void>(y), pointer<float>(scale), pointer<uint32_t>(pass),
                   pointer<uint32_t>(clip));
}

int64_t smallest_per_class(uintptr_t scores, uintptr_t labels, int64_t count, int64_t k, int64_t classes,
                           uintptr_t indices, uintptr_t counts) {
  const SmallestPerClassArgs args{pointer<const float>(scores), pointer<const int64_t>(labels), count, k, classes};
  return BDFAST_CALL_BEST(smallest_per_class, args, pointer<int64_t>(indices), pointer<int64_t>(counts));
}

int64_t histogram_entropy(uintptr_t x, int dtype, int64_t rows, int64_t columns, uintptr_t terms, double step,
                          bool strict, uintptr_t entropy) {
  const HistogramEntropyArgs args{
      pointer<const void>(x), static_cast<DType>(dtype), rows, columns, pointer<const float>(terms), step, strict};
  return BDFAST_CALL_BEST(histogram_entropy, args, pointer<float>(entropy));
}

#ifndef BDFAST_BUILD_INFO
#define BDFAST_BUILD_INFO ""
#endif
#ifndef BDFAST_VERSION
#define BDFAST_VERSION "unknown"
#endif

}  // namespace
}  // namespace bdfast

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
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("hinge_cross_entropy_fwd", &hinge_cross_entropy_fwd, nogil());
  m.def("hinge_cross_entropy_bwd", &hinge_cross_entropy_bwd, nogil());
  m.def("bounded_ascent_cross_entropy_fwd", &bounded_ascent_cross_entropy_fwd, nogil());
  m.def("bounded_ascent_cross_entropy_bwd", &bounded_ascent_cross_entropy_bwd, nogil());
  m.def("kl_divergence_fwd", &kl_divergence_fwd, nogil());
  m.def("kl_divergence_bwd", &kl_divergence_bwd, nogil());
  m.def("projected_sgd_step", &projected_sgd_step, nogil());
  m.def("clipped_relu_fwd", &clipped_relu_fwd, nogil());
  m.def("clipped_relu_bwd", &clipped_relu_bwd, nogil());
  m.def("batch_norm_clipped_relu_fwd", &batch_norm_clipped_relu_fwd, nogil());
  m.def("sce_loss_fwd", &sce_loss_fwd, nogil());
  m.def("sce_loss_bwd", &sce_loss_bwd, nogil());
  m.def("sce_margin", &sce_margin, nogil());
  m.def("linear_sce_margin_update", &linear_sce_margin_update, nogil());
  m.def("linear_sce_margin_finish", &linear_sce_margin_finish, nogil());
  m.def("smallest_per_class", &smallest_per_class, nogil());
  m.def("masked_pgd_step", &masked_pgd_step, nogil());
  m.def("patch_centers", &patch_centers, nogil());
  m.def("masked_random_start", &masked_random_start, nogil());
  m.def("scale_to_ball", &scale_to_ball, nogil());
  m.def("batch_norm_stat_distance_fwd", &batch_norm_stat_distance_fwd, nogil());
  m.def("batch_norm_stat_distance_bwd", &batch_norm_stat_distance_bwd, nogil());
  m.def("philox4x32", &philox4x32_words, nogil());
  m.def("histogram_entropy", &histogram_entropy, nogil());
#ifdef BDFAST_WITH_CUDA
  m.attr("has_cuda") = true;
  bind_cuda(m);
#else
  m.attr("has_cuda") = false;
#endif
}
