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

#include "lanes.h"

namespace bdfast {
namespace BDFAST_ISA_NAMESPACE {

constexpr int kTile = 4;     // outputs a side
constexpr int kPatch = 6;    // inputs a side
constexpr int kTaps = 3;     // weights a side
constexpr int kPlaces = 36;  // products
constexpr float kP = 0.75f, kQ = 1.5f;
constexpr float kP2 = kP * kP, kQ2 = kQ * kQ;

// v = B^T d
inline void transform_input(const Lanes d[kPatch], Lanes v[kPatch]) {
  v[0] = d[4] - (kP2 + kQ2) * d[2] + (kP2 * kQ2) * d[0];
  const Lanes even_p = d[4] - kQ2 * d[2], odd_p = d[3] - kQ2 * d[1];
  v[1] = even_p + kP * odd_p;
  v[2] = even_p - kP * odd_p;
  const Lanes even_q = d[4] - kP2 * d[2], odd_q = d[3] - kP2 * d[1];
  v[3] = even_q + kQ * odd_q;
  v[4] = even_q - kQ * odd_q;
  v[5] = d[5] - (kP2 + kQ2) * d[3] + (kP2 * kQ2) * d[1];
}

// y = A^T m
inline void transform_output(const Lanes m[kPatch], Lanes y[kTile]) {
  const Lanes even_p = m[1] + m[2], odd_p = m[1] - m[2];
  const Lanes even_q = m[3] + m[4], odd_q = m[3] - m[4];
  y[0] = m[0] + even_p + even_q;
  y[1] = kP * odd_p + kQ * odd_q;
  y[2] = kP2 * even_p + kQ2 * even_q;
  y[3] = (kP2 * kP) * odd_p + (kQ2 * kQ) * odd_q + m[5];
}

constexpr float kAtZero = 1 / (kP2 * kQ2), kAtP = 1 / (2 * kP2 * (kP2 - kQ2)), kAtQ = 1 / (2 * kQ2 * (kQ2 - kP2));

// u = G g
inline void transform_weights(const Lanes g[kTaps], Lanes u[kPatch]) {
  const Lanes even_p = kAtP * g[0] + (kAtP * kP2) * g[2], odd_p = (kAtP * kP) * g[1];
  const Lanes even_q = kAtQ * g[0] + (kAtQ * kQ2) * g[2], odd_q = (kAtQ * kQ) * g[1];
  u[0] = kAtZero * g[0];
  u[1] = even_p + odd_p;
  u[2] = even_p - odd_p;
  u[3] = even_q + odd_q;
  u[4] = even_q - odd_q;
  u[5] = g[2];
}

// Backward, to the weights: U' = (A Y' A^T) * V summed over tiles, g' = G^T U' G.

// m = A y
inline void spread_output(const Lanes y[kTile], Lanes m[kPatch]) {
  const Lanes even_p = y[0] + kP2 * y[2], odd_p = kP * y[1] + (kP2 * kP) * y[3];
  const Lanes even_q = y[0] + kQ2 * y[2], odd_q = kQ * y[1] + (kQ2 * kQ) * y[3];
  m[0] = y[0];
  m[1] = even_p + odd_p;
  m[2] = even_p - odd_p;
  m[3] = even_q + odd_q;
  m[4] = even_q - odd_q;
  m[5] = y[3];
}

// g = G^T u
inline void collect_weights(const Lanes u[kPatch], Lanes g[kTaps]) {
  const Lanes even_p = kAtP * (u[1] + u[2]), odd_p = kAtP * (u[1] - u[2]);
  const Lanes even_q = kAtQ * (u[3] + u[4]), odd_q = kAtQ * (u[3] - u[4]);
  g[0] = kAtZero * u[0] + even_p + even_q;
  g[1] = kP * odd_p + kQ * odd_q;
  g[2] = kP2 * even_p + kQ2 * even_q + u[5];
}

}  // namespace BDFAST_ISA_NAMESPACE
}  // namespace bdfast
