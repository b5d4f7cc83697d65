// Row primitives of gated_scan: the loops over adjacent channels, filled once per instruction set.
// A: the accumulate type, float or double. A row is `n` adjacent channels of one token.
#pragma once

#include <cstdint>

#include "float_rows.h"

namespace memattn::scan {

// What one token does to a state: y <- (high + low) y + weight x.
template <class A>
struct Gate {
  A* high;    // e^g rounded
  A* low;     // e^g - high: over many tokens near e^g = 1 the rounding would be raised to their number
  A* weight;  // 1 - e^g without cancellation, or 1
};

template <class A>
struct RowTable : rows::Conversions<A> {
  bool (*gate)(Gate<A> gate, const A* g, bool ema, int64_t n);  // whether one of g is above 0
  // y = e^g before + weight x; y may be `before`.
  void (*advance)(A* y, const A* before, Gate<A> gate, const A* x, int64_t n);
  // With r = dy + carry: dx += weight r, carry = e^g r, dg += carry (before - x), or carry before if not ema.
  void (*retreat)(A* carry, A* dx, A* dg, Gate<A> gate, const A* dy, const A* before, const A* x, bool ema, int64_t n);
  void (*add)(A* sum, const A* x, int64_t n);
  // Copies past the cache where the processor can and the addresses allow it; fence() before another thread reads.
  void (*stream)(void* out, const void* in, int64_t bytes);
  void (*fence)();
};

// The table in use on this processor (MEMATTN_CPU_ISA forces one).
template <class A>
const RowTable<A>& row_table();

extern const RowTable<float> kRowsPortable, kRowsAvx2, kRowsAvx512;

}  // namespace memattn::scan
