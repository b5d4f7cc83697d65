// The loops behind join_rows.h, written for the compiler to vectorise. Each join_*.cpp includes this once, inside its own
// target region and a namespace of its own, so that no function compiled for one processor is linked into another's path.
// Standard headers are included before the region for the same reason.

#include "float_rows.inl.h"

constexpr int kLanes = 32;  // sums that run side by side, so that a loop over a row is no chain of additions

template <class A>
void weigh_row(A* __restrict y, A weight, const A* __restrict x, int64_t width) {
  for (int64_t c = 0; c < width; ++c) y[c] = weight * x[c];
}

template <class A>
void weigh_and_add_row(A* __restrict y, A weight, const A* __restrict x, int64_t width) {
  for (int64_t c = 0; c < width; ++c) y[c] += weight * x[c];
}

template <class A>
void weigh(A* y, const A* weight, const A* x, bool add, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, y += width, x += width) {
    if (add) weigh_and_add_row(y, weight[r], x, width);
    else weigh_row(y, weight[r], x, width);
  }
}

template <class A, class Term>
A sum_of_row(int64_t width, const Term& term) {
  A lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(c + l);
  }
  for (int l = 0; c < width; ++c, ++l) lanes[l] += term(c);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

template <class A>
void dot(A* __restrict out, const A* __restrict x, const A* __restrict y, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
    out[r] = sum_of_row<A>(width, [&](int64_t c) { return x[c] * y[c]; });
  }
}

template <class A>
void sum(A* __restrict out, const A* __restrict x, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, x += width) out[r] = sum_of_row<A>(width, [&](int64_t c) { return x[c]; });
}

template <class A>
void combine(A* __restrict y, const A* __restrict a, const A* __restrict b, const A* __restrict g, Mode mode, int64_t n) {
  if (mode == Mode::convex) {
    for (int64_t c = 0; c < n; ++c) y[c] = b[c] + g[c] * (a[c] - b[c]);
  } else if (mode == Mode::add) {
    for (int64_t c = 0; c < n; ++c) y[c] = a[c] + g[c] * b[c];
  } else {
    for (int64_t c = 0; c < n; ++c) y[c] = g[c] * a[c] * b[c];
  }
}

template <class A>
void differentiate(A* __restrict da, A* __restrict db, A* __restrict dg, const A* __restrict dy, const A* __restrict a,
                   const A* __restrict b, const A* __restrict g, Mode mode, int64_t n) {
  if (mode == Mode::convex) {
    for (int64_t c = 0; c < n; ++c) {
      da[c] = g[c] * dy[c];
      db[c] = dy[c] - g[c] * dy[c];
      dg[c] = dy[c] * (a[c] - b[c]);
    }
  } else if (mode == Mode::add) {
    for (int64_t c = 0; c < n; ++c) {
      da[c] = dy[c];
      db[c] = g[c] * dy[c];
      dg[c] = dy[c] * b[c];
    }
  } else {
    for (int64_t c = 0; c < n; ++c) {
      da[c] = g[c] * dy[c] * b[c];
      db[c] = g[c] * dy[c] * a[c];
      dg[c] = dy[c] * a[c] * b[c];
    }
  }
}

constexpr RowTable<float> table = {{from_bfloat16, from_half, to_bfloat16, to_half}, weigh<float>, dot<float>, sum<float>,
                                   combine<float>, differentiate<float>};
