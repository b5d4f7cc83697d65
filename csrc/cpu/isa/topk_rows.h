// Row primitives of selection and of block summaries, filled once per instruction set. A: float or double.
#pragma once

#include <cstdint>

#include "float_rows.h"

namespace memattn::topk {

// Scores that may be among the largest, in ascending order of position.
template <class A>
struct Candidates {
  A* values;
  int32_t* positions;
  int64_t count, capacity;
};

// What a score must exceed, or reach if inclusive, to be a candidate. A NaN never does.
template <class A>
struct Cut {
  A value;
  bool inclusive;

  bool passed_by(A x) const { return inclusive ? x >= value : x > value; }
};

inline constexpr int64_t kBlock = 64;  // scores looked at together: `append` needs room for as many

template <class A>
struct Table : rows::Conversions<A> {
  void (*keep_larger)(A* most, const A* x, int64_t n);  // most = max(most, x), where a NaN in x is not larger
  // Appends the scores of x that pass the cut, the first of x standing at position `first`. Returns how many of x it has
  // looked at: all, or as many as there was room for.
  int64_t (*append)(Candidates<A>& to, const A* x, int64_t n, Cut<A> cut, int64_t first);
  // What lies above or below a pivot, in order; returns how many. `out` may be x, and has room for 16 more.
  int64_t (*above)(A* out, const A* x, int64_t n, A pivot);
  int64_t (*below)(A* out, const A* x, int64_t n, A pivot);
  void (*extend)(A* least, A* most, const A* x, int64_t n);  // to take in x; a NaN stays
  // Offsets of what exceeds its column's cut, row by row; returns how many. cols is a multiple of 16.
  int64_t (*exceeding)(int32_t* offsets, const A* x, int ld, int rows, int cols, const A* cuts);
};

// The table in use on this processor (MEMATTN_CPU_ISA forces one).
template <class A>
const Table<A>& table();

extern const Table<float> kTopkPortable, kTopkAvx2, kTopkAvx512;

}  // namespace memattn::topk
