// How the CPU ops hold rows: element types, the table that serves them, padded blocks and the operands made of them.
#pragma once

#include "../common/checks.h"
#include "isa/primitives.h"

#include <cmath>
#include <limits>
#include <type_traits>

namespace memattn::cpu {

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    case ScalarType::Double: return Element::f64;
    default: return Element::f32;
  }
}

inline int64_t bytes_of(Element element) { return element == Element::f64 ? 8 : element == Element::f32 ? 4 : 2; }

inline const void* offset(const void* base, Element element, int64_t index) {
  return static_cast<const char*>(base) + index * bytes_of(element);
}
inline void* offset(void* base, Element element, int64_t index) {
  return static_cast<char*>(base) + index * bytes_of(element);
}

inline ScalarType state_dtype(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

template <class Acc>
constexpr Element element_of_accumulate() {
  return sizeof(Acc) == 8 ? Element::f64 : Element::f32;
}

// Calls run(table) with the table whose operand type serves `type`: products of float16, and of bfloat16 on a processor
// without bf16 products, have float operands.
template <class Run>
auto with_primitives(ScalarType type, Run&& run) {
  if (type == ScalarType::Double) return run(*primitives<double>());
  if (const auto* table = primitives<bf16>(); table != nullptr && type == ScalarType::BFloat16) return run(*table);
  return run(*primitives<float>());
}

// Of a denominator below the smallest normal number, hence without meaning: 0.
template <class Acc>
Acc reciprocal_or_zero(Acc denominator) {
  return std::abs(denominator) < std::numeric_limits<Acc>::min() ? Acc(0) : 1 / denominator;
}

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Leading dimension of a block: an odd number of cache lines, so that a column panel is spread over all L1 sets.
inline int leading(int cols) { return ((cols + 15) / 16 | 1) * 16; }

// Operands: rows of accumulate type serve directly where E is that type, and are packed into `buffer` where it is not.
template <class E>
inline constexpr bool needs_packing = !std::is_same_v<E, AccumulateOf<E>>;

template <class E>
int64_t packed_size(int64_t rows, int64_t ld) {
  return needs_packing<E> ? rows * ld : 0;
}

template <class E>
Left<E> as_left(const Primitives<E>& isa, E* buffer, const AccumulateOf<E>* x, int ldx, int rows, int cols) {
  if constexpr (needs_packing<E>) {
    isa.pack_left(buffer, ldx, x, ldx, rows, cols);
    return {buffer, ldx, OperandTraits<E>::group};
  } else {
    return {x, ldx, 1};
  }
}

template <class E>
Right<E> as_right(const Primitives<E>& isa, E* buffer, const AccumulateOf<E>* x, int ldx, int rows, int cols) {
  if constexpr (needs_packing<E>) {
    isa.pack_right(buffer, ldx, x, ldx, nullptr, rows, cols);
    return {buffer, ldx};
  } else {
    return {x, ldx};
  }
}

template <class E>
Right<E> rows_from(Right<E> b, int row) {  // row is a multiple of the group
  return {b.data + int64_t{row} * b.ld, b.ld};
}

template <class E>
Left<E> rows_from(Left<E> a, int row) {
  return {a.data + row * a.row, a.row, a.step};
}

}  // namespace memattn::cpu
