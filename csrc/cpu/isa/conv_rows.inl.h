// The loops behind conv_rows.h, written for the compiler to vectorise. Each conv_*.cpp includes this once, inside its own
// target region and a namespace of its own, so that no function compiled for one processor is linked into another's path.
// Standard headers are included before the region for the same reason.

#include "float_rows.inl.h"

// e^x to 2 ulp: x = n ln 2 + r, polynomial in r, exponent n set by integer addition. NaN passes, large x gives inf.
inline float exponential(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.8f ? 88.8f : x;
  const float shifted = x * 1.44269504f + 0x1.8p23f;  // its low mantissa bits hold the rounded n
  const float whole = shifted - 0x1.8p23f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
}

inline double exponential(double x) { return std::exp(x); }

template <class A, int W>
void taps_of(A* __restrict z, const A* const* rows, const A* __restrict weights, int64_t stride, const A* __restrict start,
             int64_t n) {
  const A* row[W];
  for (int w = 0; w < W; ++w) row[w] = rows[w];
  for (int64_t c = 0; c < n; ++c) {
    A sum = start[c];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum += weights[w * stride + c] * row[w][c];
    z[c] = sum;
  }
}

template <class A>
void taps(A* z, const A* const* rows, const A* weights, int64_t stride, const A* start, int width, int64_t n) {
  if (width == 4) taps_of<A, 4>(z, rows, weights, stride, start, n);
  else if (width == 3) taps_of<A, 3>(z, rows, weights, stride, start, n);
  else taps_of<A, 2>(z, rows, weights, stride, start, n);
}

template <class A>
void silu(A* __restrict z, int64_t n) {
  for (int64_t c = 0; c < n; ++c) z[c] = z[c] / (A(1) + exponential(-z[c]));
}

template <class A>
void silu_slope(A* __restrict dz, const A* __restrict z, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const A sigma = A(1) / (A(1) + exponential(-z[c]));
    dz[c] *= sigma * (A(1) + z[c] * (A(1) - sigma));
  }
}

template <class A, int W>
void add_products_of(A* __restrict sums, int64_t stride, const A* __restrict dz, const A* const* rows, int64_t n) {
  const A* row[W];
  for (int w = 0; w < W; ++w) row[w] = rows[w];
  for (int64_t c = 0; c < n; ++c) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sums[w * stride + c] += dz[c] * row[w][c];
    sums[W * stride + c] += dz[c];
  }
}

template <class A>
void add_products(A* sums, int64_t stride, const A* dz, const A* const* rows, int width, int64_t n) {
  if (width == 4) add_products_of<A, 4>(sums, stride, dz, rows, n);
  else if (width == 3) add_products_of<A, 3>(sums, stride, dz, rows, n);
  else add_products_of<A, 2>(sums, stride, dz, rows, n);
}

template <class A, int W>
void step_of(A* __restrict z, const A* __restrict x, A* __restrict state, const A* __restrict weight,
             const A* __restrict bias, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    A window[W];
#pragma GCC unroll 4
    for (int w = 0; w < W - 1; ++w) window[w] = state[c * (W - 1) + w];
    window[W - 1] = x[c];
    A sum = bias[c];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum += weight[c * W + w] * window[w];
#pragma GCC unroll 4
    for (int w = 0; w < W - 1; ++w) state[c * (W - 1) + w] = window[w + 1];
    z[c] = sum;
  }
}

template <class A>
void step(A* z, const A* x, A* state, const A* weight, const A* bias, int width, int64_t n) {
  if (width == 4) step_of<A, 4>(z, x, state, weight, bias, n);
  else if (width == 3) step_of<A, 3>(z, x, state, weight, bias, n);
  else step_of<A, 2>(z, x, state, weight, bias, n);
}

constexpr RowTable<float> table = {
    {from_bfloat16, from_half, to_bfloat16, to_half}, taps<float>, silu<float>, silu_slope<float>, add_products<float>, step<float>};
