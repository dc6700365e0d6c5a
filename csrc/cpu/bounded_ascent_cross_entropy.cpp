// bounded_ascent_cross_entropy on the CPU.
//
// Computes   loss = sum_{i < n_d} CE_i / n_d - mu sum_{i >= n_d} min(CE_i, tau) / n_a
//            dz_ij = grad (p_ij - [j = y_i]) times 1 / n_d, or -mu / n_a [CE_i < tau]
// A chunk    owns 64 rows of one part, and reduces them by halves; chunks are summed in order.
// Moves      forward: reads N*C, and writes as much where it makes the gradient too; backward: reads and writes N*C.
// Accumulates rows in float32 (a row is summed in vector lanes), losses over rows in float64.
#include "bounded_ascent_cross_entropy.h"

#include <type_traits>

#include "cross_entropy_rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

// A NaN is not at rest.
struct BoundedAscent {
  float weight, tau;
  float loss(float ce) const { return at_rest(ce) ? tau : ce; }
  bool at_rest(float ce) const { return ce >= tau; }
};

double mean_weight(int64_t rows) { return 1.0 / static_cast<double>(std::max<int64_t>(1, rows)); }

// The two parts of the batch; `body(part, rule, weight, first)` is given the first row's index too.
template <class T, class Body>
void for_each_part(const BoundedAscentCrossEntropyArgs& a, const Body& body) {
  LabelledRows descend = a.rows, ascend = a.rows;
  descend.rows = a.num_descend;
  ascend.rows -= a.num_descend;
  ascend.logits = static_cast<const T*>(a.rows.logits) + a.num_descend * a.rows.row_stride;
  ascend.target += a.num_descend;
  const double down = mean_weight(descend.rows), up = -a.mu * mean_weight(ascend.rows);
  body(descend, Unbounded{static_cast<float>(down)}, down, int64_t{0});
  body(ascend, BoundedAscent{static_cast<float>(up), a.tau}, up, a.num_descend);
}

template <class T>
float forward(const BoundedAscentCrossEntropyArgs& a, float* stats, T* grad) {
  double loss = 0.0;
  for_each_part<T>(a, [&](const LabelledRows& part, const auto& rule, double weight, int64_t first) {
    T* out = grad == nullptr ? nullptr : grad + first * part.classes;
    if (part.rows > 0) loss += weight * sum_cross_entropy(part, rule, nullptr, stats + 2 * first, out);
  });
  return static_cast<float>(loss);
}

template <class T>
void backward(const BoundedAscentCrossEntropyArgs& a, const float* grad_loss, const float* stats, T* grad) {
  for_each_part<T>(a, [&](const LabelledRows& part, const auto& rule, double, int64_t first) {
    cross_entropy_gradient(part, rule, grad_loss, 0, stats + 2 * first, grad + first * part.classes);
  });
}

}  // namespace

int64_t bounded_ascent_cross_entropy_fwd(const BoundedAscentCrossEntropyArgs& args, float* loss, float* stats,
                                         void* grad_logits) {
  const LabelledRows& rows = args.rows;
  if (const int64_t outside = first_label_outside(rows.target, rows.rows, rows.classes); outside >= 0) return outside;
  visit_dtype(rows.dtype,
              [&](auto* element) { *loss = forward(args, stats, static_cast<decltype(element)>(grad_logits)); });
  return -1;
}

void bounded_ascent_cross_entropy_bwd(const BoundedAscentCrossEntropyArgs& args, const float* grad_loss,
                                      const float* stats, void* grad_logits) {
  visit_dtype(args.rows.dtype,
              [&](auto* element) { backward(args, grad_loss, stats, static_cast<decltype(element)>(grad_logits)); });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
