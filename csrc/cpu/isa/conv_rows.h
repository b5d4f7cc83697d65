// Row primitives of causal_conv1d: the loops over adjacent channels, filled once per instruction set.
// A: the accumulate type, float or double. A row is `n` adjacent channels of one token.
#pragma once

#include "float_rows.h"

namespace memattn::conv {

constexpr int kMaxWidth = 4;

template <class A>
struct RowTable : rows::Conversions<A> {
  // z = start + Σ_w weights[w * stride] · rows[w], rows oldest first
  void (*taps)(A* z, const A* const* rows, const A* weights, int64_t stride, const A* start, int width, int64_t n);
  void (*silu)(A* z, int64_t n);                   // z = z σ(z)
  void (*silu_slope)(A* dz, const A* z, int64_t n);  // dz *= σ(z) (1 + z (1 − σ(z)))
  // sums[w * stride] += dz · rows[w] for each tap, sums[width * stride] += dz
  void (*add_products)(A* sums, int64_t stride, const A* dz, const A* const* rows, int width, int64_t n);
  // One token: state [n, width-1] holds the tail and takes in x; z = bias + Σ weight · window. weight [n, width].
  void (*step)(A* z, const A* x, A* state, const A* weight, const A* bias, int width, int64_t n);
};

// The table in use on this processor (MEMATTN_CPU_ISA forces one).
template <class A>
const RowTable<A>& row_table();

extern const RowTable<float> kRowsPortable, kRowsAvx2, kRowsAvx512;
extern const RowTable<double> kRowsPortableDouble;

}  // namespace memattn::conv
