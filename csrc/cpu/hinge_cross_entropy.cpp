// hinge_cross_entropy on the CPU.
//
// Computes   loss_i = max(0, CE_i - margin), dz_ij = grad_i * [CE_i > margin] * (p_ij - [j = y_i])
// A chunk    owns 64 rows, and reduces them by halves; chunks are summed in order.
// Moves      forward: reads N*C, and writes as much where it makes the gradient too; backward: reads and writes N*C
//            (inactive rows are only written).
// Accumulates rows in float32 (a row is summed in vector lanes), losses over rows in float64.
#include "hinge_cross_entropy.h"

#include <type_traits>

#include "cross_entropy_rows.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {
namespace {

// The hinge is inactive only where CE <= margin is true: a NaN loss is not masked.
struct Hinge {
  float weight, margin;
  float loss(float ce) const { return at_rest(ce) ? 0.0f : ce - margin; }
  bool at_rest(float ce) const { return ce <= margin; }
};

// Of a row in the reduced loss.
float weight_of(const HingeCrossEntropyArgs& a, Reduction reduction) {
  return reduction == Reduction::mean ? 1.0f / static_cast<float>(a.rows.rows) : 1.0f;
}

template <class T>
int64_t forward(const HingeCrossEntropyArgs& a, Reduction reduction, float* loss, float* stats, void* grad_logits) {
  const LabelledRows& rows = a.rows;
  if (const int64_t outside = first_label_outside(rows.target, rows.rows, rows.classes); outside >= 0) return outside;
  const Hinge hinge{weight_of(a, reduction), a.margin};
  float* each = reduction == Reduction::none ? loss : nullptr;
  T* grad = static_cast<T*>(grad_logits);
  const double total = a.batch_hinge ? sum_cross_entropy(rows, Unbounded{hinge.weight}, each, stats, grad)
                                     : sum_cross_entropy(rows, hinge, each, stats, grad);
  if (reduction == Reduction::none) return -1;
  const float reduced = reduce(total, reduction, rows.rows);
  *loss = a.batch_hinge ? hinge.loss(reduced) : reduced;
  return -1;
}

template <class T>
void backward(const HingeCrossEntropyArgs& a, Reduction reduction, const float* grad_loss, const float* loss,
              const float* stats, T* grad) {
  const Hinge hinge{weight_of(a, reduction), a.margin};
  const int64_t grad_stride = reduction == Reduction::none ? 1 : 0;
  if (!a.batch_hinge) {
    cross_entropy_gradient(a.rows, hinge, grad_loss, grad_stride, stats, grad);
  } else if (*loss <= 0.0f) {
    std::fill(grad, grad + a.rows.rows * a.rows.classes, T{});
  } else {
    cross_entropy_gradient(a.rows, Unbounded{hinge.weight}, grad_loss, grad_stride, stats, grad);
  }
}

}  // namespace

int64_t hinge_cross_entropy_fwd(const HingeCrossEntropyArgs& args, Reduction reduction, float* loss, float* stats,
                                void* grad_logits) {
  return visit_dtype(args.rows.dtype, [&](auto* element) {
    return forward<std::remove_pointer_t<decltype(element)>>(args, reduction, loss, stats, grad_logits);
  });
}

void hinge_cross_entropy_bwd(const HingeCrossEntropyArgs& args, Reduction reduction, const float* grad_loss,
                             const float* loss, const float* stats, void* grad_logits) {
  if (args.rows.rows == 0) return;
  visit_dtype(args.rows.dtype, [&](auto* element) {
    backward(args, reduction, grad_loss, loss, stats, static_cast<decltype(element)>(grad_logits));
  });
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
