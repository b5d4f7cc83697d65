// Row primitives of merge_states and gated_combine: the loops over adjacent numbers, filled once per instruction set.
// A: the accumulate type, float or double. Rows lie end to end, `width` numbers each; no array overlaps another.
#pragma once

#include <cstdint>

#include "float_rows.h"

namespace memattn::join {

enum class Mode : int64_t { convex, add, mul };  // g a + (1 - g) b, a + g b, g a b

template <class A>
struct RowTable : rows::Conversions<A> {
  void (*weigh)(A* y, const A* weight, const A* x, bool add, int64_t rows, int64_t width);  // y = w x, or y += w x
  void (*dot)(A* out, const A* x, const A* y, int64_t rows, int64_t width);
  void (*sum)(A* out, const A* x, int64_t rows, int64_t width);
  void (*combine)(A* y, const A* a, const A* b, const A* g, Mode mode, int64_t n);
  void (*differentiate)(A* da, A* db, A* dg, const A* dy, const A* a, const A* b, const A* g, Mode mode, int64_t n);
};

// The table in use on this processor (MEMATTN_CPU_ISA forces one).
template <class A>
const RowTable<A>& row_table();

extern const RowTable<float> kRowsPortable, kRowsAvx2, kRowsAvx512;

}  // namespace memattn::join
