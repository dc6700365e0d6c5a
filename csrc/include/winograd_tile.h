// The transforms of F(4x4, 3x3): a 3x3 convolution of 4x4 pixels as 36 products instead of 144.
//
// A row of four outputs y_k = sum_r g_r d_{k + r} is a product of polynomials, known from its values at six points. With
// 0, +-3/4, +-3/2 and infinity (the usual +-1, +-2 round twice as coarsely; in float32 the result is off by some 2.5
// times what the sum of nine products is off by):
//
//   y = A^T [(G g) * (B^T d)],   two dimensions: Y = A^T [(G g G^T) * (B^T d B)] A
//
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015; the points are our choice. The constants of A
// and B are exact in float32.
#pragma once

#include "cpu_vector.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

constexpr int kTile = 4;     // outputs a side
constexpr int kPatch = 6;    // inputs a side
constexpr int kTaps = 3;     // weights a side
constexpr int kPlaces = 36;  // products
constexpr float kP = 0.75f, kQ = 1.5f;
constexpr float kP2 = kP * kP, kQ2 = kQ * kQ;
static_assert(kQ == 2 * kP, "the powers of 2 below are those of Q / P");

// v = B^T d
inline void transform_input(const Vector d[kPatch], Vector v[kPatch]) {
  v[0] = (d[4] - (kP2 + kQ2) * d[2]) + (kP2 * kQ2) * d[0];
  const Vector even_p = d[4] - kQ2 * d[2], odd_p = d[3] - kQ2 * d[1];
  v[1] = even_p + kP * odd_p;
  v[2] = even_p - kP * odd_p;
  const Vector even_q = d[4] - kP2 * d[2], odd_q = d[3] - kP2 * d[1];
  v[3] = even_q + kQ * odd_q;
  v[4] = even_q - kQ * odd_q;
  v[5] = (d[5] - (kP2 + kQ2) * d[3]) + (kP2 * kQ2) * d[1];
}

// y = A^T m
inline void transform_output(const Vector m[kPatch], Vector y[kTile]) {
  const Vector even_p = m[1] + m[2], odd_p = m[1] - m[2];
  const Vector even_q = m[3] + m[4], odd_q = m[3] - m[4];
  y[0] = m[0] + (even_p + even_q);
  y[1] = kP * (odd_p + 2.0f * odd_q);
  y[2] = kP2 * (even_p + 4.0f * even_q);
  y[3] = (kP2 * kP) * (odd_p + 8.0f * odd_q) + m[5];
}

// Of the rows of G, which end in 1 / f(0), 1 / f(P) and 1 / f(Q), f the product of the distances to the other points.
constexpr float kAtP = 1 / (2 * kP2 * (kP2 - kQ2)), kAtZero = -1.5f * kAtP, kAtQ = -0.25f * kAtP;

// u = G g
inline void transform_weights(const Vector g[kTaps], Vector u[kPatch]) {
  const Vector even_p = g[0] + kP2 * g[2], even_q = g[0] + kQ2 * g[2];
  u[0] = kAtZero * g[0];
  u[1] = kAtP * (even_p + kP * g[1]);
  u[2] = kAtP * (even_p - kP * g[1]);
  u[3] = kAtQ * (even_q + kQ * g[1]);
  u[4] = kAtQ * (even_q - kQ * g[1]);
  u[5] = g[2];
}

// Backward, to the weights: U' = (A Y' A^T) * V summed over tiles, g' = G^T U' G.

// m = A y
inline void spread_output(const Vector y[kTile], Vector m[kPatch]) {
  const Vector even_p = y[0] + kP2 * y[2], odd_p = y[1] + kP2 * y[3];
  const Vector even_q = y[0] + kQ2 * y[2], odd_q = y[1] + kQ2 * y[3];
  m[0] = y[0];
  m[1] = even_p + kP * odd_p;
  m[2] = even_p - kP * odd_p;
  m[3] = even_q + kQ * odd_q;
  m[4] = even_q - kQ * odd_q;
  m[5] = y[3];
}

// g = G^T u
inline void collect_weights(const Vector u[kPatch], Vector g[kTaps]) {
  const Vector even_p = u[1] + u[2], odd_p = u[1] - u[2];
  const Vector even_q = u[3] + u[4], odd_q = u[3] - u[4];
  g[0] = kAtP * ((even_p - 0.25f * even_q) - 1.5f * u[0]);
  g[1] = (kAtP * kP) * (odd_p - 0.5f * odd_q);
  g[2] = (kAtP * kP2) * (even_p - even_q) + u[5];
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
